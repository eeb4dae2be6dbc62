{{/* The parts of a pod that Ray's nodes, the applying process and the jobs share. */}}

{{- define "expertmesh.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ .Values.securityContext.runAsUser }}
runAsGroup: {{ .Values.securityContext.runAsGroup }}
fsGroup: {{ .Values.securityContext.fsGroup }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* (dict "ipcLock" BOOL): what Pod Security's "restricted" asks for, with one capability opted into. */}}
{{- define "expertmesh.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
  {{- if .ipcLock }}
  add: [IPC_LOCK]
  {{- end }}
{{- end }}

{{/* Where to schedule a pod; takes a pool's values. */}}
{{- define "expertmesh.scheduling" -}}
{{- $found := dict }}
{{- range $key := list "nodeSelector" "affinity" "tolerations" "priorityClassName" "schedulerName" "runtimeClassName" }}
{{- with index $ $key }}
{{- $_ := set $found $key . }}
{{- end }}
{{- end }}
{{- with $found }}
{{- toYaml . }}
{{- end }}
{{- end }}

{{/* Which directories can be written: everything else of the image is read-only. */}}
{{- define "expertmesh.scratchMounts" -}}
- name: tmp
  mountPath: /tmp
- name: home
  mountPath: /home/expertmesh
{{- end }}

{{- define "expertmesh.scratchVolumes" -}}
- name: tmp
  emptyDir: {}
- name: home
  emptyDir: {}
{{- end }}

{{- define "expertmesh.modelMount" -}}
{{- if ne .Values.model.source "image" -}}
- name: model
  mountPath: {{ .Values.model.mountPath }}
  readOnly: true
  {{- with .Values.model.pvc.subPath }}
  subPath: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "expertmesh.modelVolume" -}}
{{- if eq .Values.model.source "pvc" -}}
- name: model
  persistentVolumeClaim:
    claimName: {{ include "expertmesh.modelClaim" . }}
{{- else if eq .Values.model.source "hostPath" -}}
- name: model
  hostPath:
    path: {{ .Values.model.hostPath.path }}
    type: {{ .Values.model.hostPath.type }}
{{- end }}
{{- end }}

{{- define "expertmesh.modelClaim" -}}
{{- .Values.model.pvc.existingClaim | default (printf "%s-model" (include "expertmesh.fullname" .)) }}
{{- end }}

{{/* The variables of every Ray process; where KubeRay is to set a token it sets the mode too. */}}
{{- define "expertmesh.env" -}}
- name: HOME
  value: /home/expertmesh
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
- name: EXPERTMESH_BUILD
  value: {{ include "expertmesh.image" . | quote }}
{{- if eq .Values.ray.auth.mode "disabled" }}
- name: RAY_AUTH_MODE
  value: disabled
{{- end }}
{{- end }}

{{/* Ray's own health: of its node, and on the head of the GCS too. True of a node that holds nothing yet. */}}
{{- define "expertmesh.rayHealth" -}}
httpGet:
  path: /api/healthz
  port: ray-health
{{- end }}

{{/* One pod of Ray: (dict "root" $ "role" ROLE "group" NAME "pool" VALUES). */}}
{{- define "expertmesh.rayPod" -}}
{{- $root := .root }}
{{- $pool := .pool }}
{{- $isHead := eq .role "head" }}
{{- $isDoor := eq .role "frontdoor" -}}
metadata:
  labels:
    {{- include "expertmesh.selectorLabels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .role }}
    {{- with mergeOverwrite (dict) $root.Values.commonLabels $pool.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with mergeOverwrite (dict) $root.Values.commonAnnotations $pool.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- with include "expertmesh.imagePullSecrets" $root }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- if $isHead }}
  {{- if $root.Values.head.serviceAccount.create }}
  serviceAccountName: {{ include "expertmesh.fullname" $root }}-head
  {{- else if $root.Values.head.serviceAccount.name }}
  serviceAccountName: {{ $root.Values.head.serviceAccount.name }}
  {{- end }}
  {{- else }}
  serviceAccountName: {{ include "expertmesh.serviceAccountName" $root }}
  automountServiceAccountToken: false
  {{- end }}
  enableServiceLinks: false
  restartPolicy: Never
  terminationGracePeriodSeconds: {{ add (include "expertmesh.drainSeconds" .) 30 }}
  securityContext:
    {{- include "expertmesh.podSecurityContext" $root | nindent 4 }}
  {{- with include "expertmesh.scheduling" $pool }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with $pool.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $pool.resourceClaims }}
  resourceClaims:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $pool.initContainers }}
  initContainers:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ ternary "ray-head" "ray-worker" $isHead }}
      image: {{ include "expertmesh.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      # KubeRay generates `ray start`; in place of a shell, Ray hears SIGTERM and drains its node.
      command: [/bin/bash, -c, --]
      args: ['ulimit -n 65536; eval "exec $KUBERAY_GEN_RAY_START_CMD"']
      securityContext:
        {{- include "expertmesh.containerSecurityContext" (dict "ipcLock" $pool.ipcLock) | nindent 8 }}
      env:
        {{- include "expertmesh.env" $root | nindent 8 }}
        - name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
          value: {{ include "expertmesh.drainSeconds" . | quote }}
        {{- if $isHead }}
        {{- range $name, $value := $root.Values.ray.healthCheck }}
        - name: RAY_health_check_{{ $name }}
          value: {{ $value | int64 | toString | quote }}
        {{- end }}
        {{- end }}
        {{- with $pool.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with $pool.extraEnvFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      ports:
        - name: ray-health
          containerPort: {{ $root.Values.ray.ports.health }}
        - name: metrics # Ray's own; KubeRay knows it by this name
          containerPort: {{ $root.Values.ray.ports.metrics }}
        {{- if $isHead }}
        - name: gcs-server
          containerPort: 6379
        - name: client
          containerPort: 10001
        {{- else if int (include "expertmesh.metricsPort" $root) }}
        - name: em-metrics
          containerPort: {{ include "expertmesh.metricsPort" $root }}
        {{- end }}
        {{- if $isDoor }}
        - name: grpc
          containerPort: {{ include "expertmesh.port" $root }}
        {{- with include "expertmesh.healthPort" $root }}
        - name: grpc-health
          containerPort: {{ . }}
        {{- end }}
        {{- end }}
      startupProbe:
        {{- include "expertmesh.rayHealth" $root | nindent 8 }}
        {{- toYaml $root.Values.probes.startup | nindent 8 }}
      livenessProbe:
        {{- include "expertmesh.rayHealth" $root | nindent 8 }}
        {{- toYaml $root.Values.probes.liveness | nindent 8 }}
      readinessProbe:
        {{- if $isDoor }}
        grpc:
          port: {{ include "expertmesh.healthPort" $root | default (include "expertmesh.port" $root) }}
          service: {{ $root.Values.probes.frontDoorService }}
        {{- else }}
        {{- include "expertmesh.rayHealth" $root | nindent 8 }}
        {{- end }}
        {{- toYaml $root.Values.probes.readiness | nindent 8 }}
      resources:
        {{- include "expertmesh.resources" $pool | nindent 8 }}
      volumeMounts:
        {{- include "expertmesh.scratchMounts" $root | nindent 8 }}
        - name: dshm
          mountPath: /dev/shm
        {{- if $isHead }}
        {{- if $root.Values.config.control.journal }}
        - name: head
          mountPath: {{ $root.Values.config.control.journal }}
          subPath: journal
        {{- end }}
        {{- else }}
        {{- with include "expertmesh.modelMount" $root }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- end }}
        {{- if $isDoor }}
        {{- if include "expertmesh.tlsSecret" $root }}
        - name: tls
          mountPath: {{ $root.Values.tls.mountPath }}
          readOnly: true
        {{- end }}
        {{- if $root.Values.apiKeys.existingSecret }}
        - name: api-keys
          mountPath: {{ $root.Values.apiKeys.mountPath }}
          readOnly: true
        {{- end }}
        {{- end }}
        {{- with $pool.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    {{- with $pool.extraContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes:
    {{- include "expertmesh.scratchVolumes" $root | nindent 4 }}
    - name: dshm
      emptyDir:
        medium: Memory
        sizeLimit: {{ $pool.shmSize }}
    {{- if $isHead }}
    {{- if $root.Values.config.control.journal }}
    - name: head
      {{- if $root.Values.head.persistence.enabled }}
      persistentVolumeClaim:
        claimName: {{ include "expertmesh.headClaim" $root }}
      {{- else }}
      emptyDir: {}
      {{- end }}
    {{- end }}
    {{- else }}
    {{- with include "expertmesh.modelVolume" $root }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- end }}
    {{- if $isDoor }}
    {{- with include "expertmesh.tlsSecret" $root }}
    - name: tls
      secret:
        secretName: {{ . }}
        defaultMode: 0440
    {{- end }}
    {{- with $root.Values.apiKeys.existingSecret }}
    - name: api-keys
      secret:
        secretName: {{ . }}
        defaultMode: 0440
    {{- end }}
    {{- end }}
    {{- with $pool.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{/* How long a pod may take to give its work up: as long as the configuration lets its role drain. */}}
{{- define "expertmesh.drainSeconds" -}}
{{- $config := .root.Values.config }}
{{- if not (kindIs "invalid" .pool.drainSeconds) }}{{ int .pool.drainSeconds }}
{{- else if eq .role "gateway" }}{{ dig "drain_s" 600 $config.gateways | int }}
{{- else if eq .role "frontdoor" }}{{ add 10 (dig "drain_s" 30 $config.front_doors | int) }}
{{- else }}60
{{- end }}
{{- end }}

{{/* A pool's requests and limits, with its GPUs and RDMA devices, which are asked for as both. */}}
{{- define "expertmesh.resources" -}}
{{- $resources := deepCopy .resources }}
{{- range list .gpu .rdma }}
{{- if and . .count }}
{{- $_ := set $resources "limits" (merge (dict .resource (.count | int | toString)) (default (dict) $resources.limits)) }}
{{- $_ := set $resources "requests" (merge (dict .resource (.count | int | toString)) (default (dict) $resources.requests)) }}
{{- end }}
{{- end }}
{{- toYaml $resources }}
{{- end }}
