{{/* Combinations that cannot work are refused here, with what to do. */}}
{{- define "expertmesh.check" -}}
{{- $doors := .Values.config.front_doors }}
{{- $telemetry := default (dict) .Values.config.telemetry }}
{{- if include "expertmesh.hasTls" . }}
{{- if not (include "expertmesh.tlsSecret" .) }}
{{- fail "config.front_doors.tls names files, but no Secret holds them: set tls.existingSecret or tls.certManager.enabled" }}
{{- end }}
{{- if not (include "expertmesh.healthPort" .) }}
{{- fail "config.front_doors.tls: Kubernetes' probes speak no TLS; set config.front_doors.health_listen (0.0.0.0:50052)" }}
{{- end }}
{{- range $key := list "cert" "key" "client_ca" }}
{{- with index $doors.tls $key }}
{{- if not (hasPrefix (printf "%s/" $.Values.tls.mountPath) .) }}
{{- fail (printf "config.front_doors.tls.%s: %s does not lie in tls.mountPath, %s" $key . $.Values.tls.mountPath) }}
{{- end }}
{{- end }}
{{- end }}
{{- else if include "expertmesh.tlsSecret" . }}
{{- fail "tls: a Secret is mounted, but config.front_doors.tls names no files: front doors would speak cleartext" }}
{{- end }}
{{- if and .Values.tls.certManager.enabled (not .Values.tls.certManager.issuerRef.name) }}
{{- fail "tls.certManager.issuerRef.name: name the issuer" }}
{{- end }}
{{- $keys := $doors.api_keys_file | default "" }}
{{- if and $keys (not .Values.apiKeys.existingSecret) }}
{{- fail "config.front_doors.api_keys_file names a file, but no Secret holds it: set apiKeys.existingSecret" }}
{{- end }}
{{- if and .Values.apiKeys.existingSecret (not $keys) }}
{{- fail "apiKeys: a Secret is mounted, but config.front_doors.api_keys_file names no file: anybody could call" }}
{{- end }}
{{- if and $keys (not (hasPrefix (printf "%s/" .Values.apiKeys.mountPath) $keys)) }}
{{- fail (printf "config.front_doors.api_keys_file: %s does not lie in apiKeys.mountPath, %s" $keys .Values.apiKeys.mountPath) }}
{{- end }}
{{- if not (or $keys (dig "tls" "client_ca" "" $doors) $doors.insecure) }}
{{- fail "anybody could call the front doors: set apiKeys.existingSecret and config.front_doors.api_keys_file, or config.front_doors.tls.client_ca, or say config.front_doors.insecure: true if you mean it" }}
{{- end }}
{{- if or (hasPrefix "127." $doors.listen) (hasPrefix "localhost" $doors.listen) }}
{{- fail "config.front_doors.listen: nobody outside the pod reaches a loopback address; set 0.0.0.0:50051" }}
{{- end }}
{{- if eq (include "expertmesh.port" .) "0" }}
{{- fail "config.front_doors.listen: a Service needs a port that is known; set 0.0.0.0:50051" }}
{{- end }}
{{- if and (ne .Values.ray.gcs.backend "none") (not .Values.head.persistence.enabled) (eq .Values.ray.gcs.backend "rocksdb") }}
{{- fail "ray.gcs.backend: rocksdb keeps the tables on the head's claim; set head.persistence.enabled, or backend redis or none" }}
{{- end }}
{{- if and (eq .Values.ray.gcs.backend "redis") (not .Values.ray.gcs.redis.address) }}
{{- fail "ray.gcs.redis.address: name the Redis (HOST:PORT)" }}
{{- end }}
{{- if and .Values.config.control.journal (not (index (.Values.config.control.resources | default (dict)) "controller")) }}
{{- fail "config.control.resources: set {controller: 1}; the journal lies on the head's claim, and the controller must run beside it" }}
{{- end }}
{{- if and .Values.podMonitor.enabled (or (not $telemetry.metrics_port) (hasPrefix "127." ($telemetry.metrics_host | default "127.0.0.1"))) }}
{{- fail "podMonitor: set config.telemetry.metrics_host: 0.0.0.0 and config.telemetry.metrics_port" }}
{{- end }}
{{- include "expertmesh.checkModel" . }}
{{- include "expertmesh.checkPools" . }}
{{- end }}

{{- define "expertmesh.checkModel" -}}
{{- $path := dig "model" "path" "demo" .Values.config }}
{{- if and (ne .Values.model.source "image") (not (hasPrefix (printf "%s/" .Values.model.mountPath) $path)) (ne $path .Values.model.mountPath) }}
{{- fail (printf "config.model.path: %s does not lie in model.mountPath, %s" $path .Values.model.mountPath) }}
{{- end }}
{{- if and (eq .Values.model.source "hostPath") (not .Values.model.hostPath.path) }}
{{- fail "model.hostPath.path: name the directory on the nodes" }}
{{- end }}
{{- with .Values.model.preload }}
{{- if .enabled }}
{{- if ne $.Values.model.source "pvc" }}
{{- fail "model.preload: the Job writes to a claim; set model.source: pvc" }}
{{- end }}
{{- if not .directory }}
{{- fail "model.preload.directory: name the directory that is written" }}
{{- end }}
{{- if and (eq .from "hf") (not .repo) }}
{{- fail "model.preload.repo: name the repository (ORGANISATION/NAME)" }}
{{- end }}
{{- if and (eq .from "s3") (not (and .uri .image)) }}
{{- fail "model.preload: s3 needs `uri` and an `image` with the aws command" }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "expertmesh.checkPools" -}}
{{- $most := dict "frontdoor" 0 "gateway" 0 "expert" 0 }}
{{- range $name, $group := include "expertmesh.groups" . | fromYaml }}
{{- $pool := $group.pool }}
{{- if gt (int $pool.minReplicas) (int $pool.maxReplicas) }}
{{- fail (printf "%s: minReplicas %d is above maxReplicas %d" $name (int $pool.minReplicas) (int $pool.maxReplicas)) }}
{{- end }}
{{- $places := int $pool.maxReplicas }}
{{- if eq $group.role "gateway" }}
{{- $places = mul $places (int ($pool.ranksPerPod | default 1)) }}
{{- end }}
{{- $_ := set $most $group.role (add (int (index $most $group.role)) $places) }}
{{- range list (dict "what" "gpu" "device" $pool.gpu) (dict "what" "rdma" "device" $pool.rdma) }}
{{- if and .device.count (not .device.resource) }}
{{- fail (printf "%s: %s.resource: name the resource of the device plugin" $name .what) }}
{{- end }}
{{- end }}
{{- end }}
{{- $gateways := default (dict) .Values.config.gateways }}
{{- $warm := int ($gateways.standby | default 0) }}
{{- $ranks := mul (add (int ($gateways.count | default 1)) $warm) (int ($gateways.tensor_parallel | default 1)) }}
{{- if gt $ranks (int $most.gateway) }}
{{- fail (printf "config.gateways wants %d ranks, and gatewayPools have places for %d: raise maxReplicas or ranksPerPod" $ranks (int $most.gateway)) }}
{{- end }}
{{- $experts := default (dict) .Values.config.experts }}
{{- $workers := add (int (default 2 $experts.workers)) (int ($experts.standby | default 0)) }}
{{- if and (hasKey $experts "workers") (eq (int $experts.workers) 0) }}
{{- $workers = 0 }}
{{- end }}
{{- if gt (int $workers) (int $most.expert) }}
{{- fail (printf "config.experts wants %d workers and standbys, and expertPools have places for %d: raise maxReplicas" (int $workers) (int $most.expert)) }}
{{- end }}
{{- $autoscaler := default (dict) .Values.config.autoscaler }}
{{- if eq (default "ray" $autoscaler.actuator) "kuberay" }}
{{- fail "config.autoscaler.actuator: this chart's RayCluster is scaled by Ray's autoscaler; leave it at ray" }}
{{- end }}
{{- $scaled := add (int (dig "experts" "max" 0 $autoscaler)) (int ($experts.standby | default 0)) }}
{{- if gt (int $scaled) (int $most.expert) }}
{{- fail (printf "config.autoscaler.experts.max and standbys come to %d, and expertPools have places for %d: raise maxReplicas" (int $scaled) (int $most.expert)) }}
{{- end }}
{{- $most_gateways := int (dig "gateways" "max" 0 $autoscaler) }}
{{- $scaled = mul (add $most_gateways (ternary $warm 0 (gt $most_gateways 0))) (int ($gateways.tensor_parallel | default 1)) }}
{{- if gt (int $scaled) (int $most.gateway) }}
{{- fail (printf "config.autoscaler.gateways.max comes to %d ranks, and gatewayPools have places for %d: raise maxReplicas or ranksPerPod" (int $scaled) (int $most.gateway)) }}
{{- end }}
{{- $doors := int (.Values.config.front_doors.count | default 1) }}
{{- if gt $doors (int $most.frontdoor) }}
{{- fail (printf "config.front_doors wants %d, and frontDoors has places for %d: raise frontDoors.maxReplicas" $doors (int $most.frontdoor)) }}
{{- end }}
{{- range $section, $resource := dict "gateways" "gateway" "experts" "expert_slot" "front_doors" "frontdoor" }}
{{- if not (dig $section "resources" $resource 0 $.Values.config) }}
{{- fail (printf "config.%s.resources: set {%s: 1}, by which Ray finds the pods of this role" $section $resource) }}
{{- end }}
{{- end }}
{{- end }}
