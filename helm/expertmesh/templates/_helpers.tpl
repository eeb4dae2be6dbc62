{{/* Names, labels, images and addresses that several manifests share. */}}

{{- define "expertmesh.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* The release's name, and that of its RayCluster: KubeRay appends to it, so it stays short. */}}
{{- define "expertmesh.fullname" -}}
{{- $name := include "expertmesh.name" . }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "expertmesh.selectorLabels" -}}
app.kubernetes.io/name: {{ include "expertmesh.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "expertmesh.labels" -}}
{{ include "expertmesh.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: expertmesh
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* What every object's metadata holds: (dict "root" $ "name" NAME "component" WHAT "annotations" {}). */}}
{{- define "expertmesh.metadata" -}}
name: {{ .name }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "expertmesh.labels" .root | nindent 2 }}
  app.kubernetes.io/component: {{ .component }}
{{- with mergeOverwrite (dict) (deepCopy .root.Values.commonAnnotations) (default (dict) .annotations) }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "expertmesh.image" -}}
{{- $registry := .Values.global.imageRegistry | default .Values.image.registry }}
{{- with $registry }}{{ . }}/{{ end }}{{ .Values.image.repository }}
{{- if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ end }}
{{- end }}

{{- define "expertmesh.imagePullSecrets" -}}
{{- with concat .Values.global.imagePullSecrets .Values.imagePullSecrets -}}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "expertmesh.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "expertmesh.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* The configuration, as the product reads it. */}}
{{- define "expertmesh.config" -}}
{{- toYaml .Values.config }}
{{- end }}

{{/* The port of a HOST:PORT of the configuration. */}}
{{- define "expertmesh.portOf" -}}
{{- regexFind "[0-9]+$" . }}
{{- end }}

{{- define "expertmesh.port" -}}
{{- include "expertmesh.portOf" .Values.config.front_doors.listen }}
{{- end }}

{{- define "expertmesh.healthPort" -}}
{{- include "expertmesh.portOf" (.Values.config.front_doors.health_listen | default "") }}
{{- end }}

{{- define "expertmesh.metricsPort" -}}
{{- dig "telemetry" "metrics_port" 0 .Values.config | int }}
{{- end }}

{{- define "expertmesh.hasTls" -}}
{{- if dig "tls" "cert" "" .Values.config.front_doors }}true{{ end }}
{{- end }}

{{- define "expertmesh.tlsSecret" -}}
{{- .Values.tls.existingSecret | default (and .Values.tls.certManager.enabled (printf "%s-tls" (include "expertmesh.fullname" .))) | default "" }}
{{- end }}

{{- define "expertmesh.headService" -}}
{{ include "expertmesh.fullname" . }}-head-svc
{{- end }}

{{- define "expertmesh.headClaim" -}}
{{- .Values.head.persistence.existingClaim | default (printf "%s-head" (include "expertmesh.fullname" .)) }}
{{- end }}

{{- define "expertmesh.rayTokenSecret" -}}
{{- .Values.ray.auth.existingSecret | default (include "expertmesh.fullname" .) }}
{{- end }}

{{/* What Ray pods are selected by; KubeRay sets these labels. */}}
{{- define "expertmesh.raySelector" -}}
ray.io/cluster: {{ include "expertmesh.fullname" . }}
{{- end }}

{{/* A pool's values over the defaults of all pools, as YAML: (dict "root" $ "pool" VALUES). */}}
{{- define "expertmesh.pool" -}}
{{- toYaml (mustMergeOverwrite (deepCopy .root.Values.podDefaults) (deepCopy .pool)) }}
{{- end }}

{{/* All worker groups by their name, with the role and its Ray resource, as YAML. */}}
{{- define "expertmesh.groups" -}}
{{- $root := . }}
frontdoor:
  role: frontdoor
  rayResources: {frontdoor: "1"}
  pool:
    {{- include "expertmesh.pool" (dict "root" $root "pool" .Values.frontDoors) | nindent 4 }}
{{- range $name, $pool := .Values.gatewayPools }}
gateway-{{ $name }}:
  role: gateway
  rayResources: {gateway: {{ $pool.ranksPerPod | default 1 | toString | quote }}}
  pool:
    {{- include "expertmesh.pool" (dict "root" $root "pool" $pool) | nindent 4 }}
{{- end }}
{{- range $name, $pool := .Values.expertPools }}
expert-{{ $name }}:
  role: expert
  rayResources: {expert_slot: "1"}
  pool:
    {{- include "expertmesh.pool" (dict "root" $root "pool" $pool) | nindent 4 }}
{{- end }}
{{- end }}
