{{/* Names, labels and the small decisions that several templates share. */}}

{{- define "sida.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 40 | trimSuffix "-" }}
{{- end -}}
{{- end }}

{{/* A map whose values Kubernetes wants to be text: labels, annotations, node selectors. */}}
{{- define "sida.texts" -}}
{{- $texts := dict -}}
{{- range $key, $value := . -}}
{{- if not (kindIs "invalid" $value) }}{{ $_ := set $texts $key (toString $value) }}{{ end -}}
{{- end -}}
{{- if $texts }}{{ toYaml $texts }}{{ end -}}
{{- end }}

{{- define "sida.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{/* Labels of an object. Called with a list: the root, the component or "", and more labels; the latter two may be missing. */}}
{{- define "sida.labels" -}}
{{- $root := index . 0 -}}
{{- $labels := dict "helm.sh/chart" (printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_") -}}
{{- $_ := set $labels "app.kubernetes.io/version" $root.Chart.AppVersion -}}
{{- $_ := set $labels "app.kubernetes.io/managed-by" $root.Release.Service -}}
{{- $more := ternary (last .) dict (eq (len .) 3) -}}
{{- range list $root.Values.global.commonLabels $root.Values.commonLabels $more (include "sida.selector" $root | fromYaml) -}}
{{- range $key, $value := . }}{{ $_ := set $labels $key $value }}{{ end -}}
{{- end -}}
{{- if and (gt (len .) 1) (index . 1) }}{{ $_ := set $labels "app.kubernetes.io/component" (index . 1) }}{{ end -}}
{{ include "sida.texts" $labels }}
{{- end }}

{{- define "sida.annotations" -}}
{{- with include "sida.texts" . }}
annotations:
  {{- . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "sida.serviceAccount" -}}
{{ default (include "sida.fullname" .) .Values.serviceAccount.name }}
{{- end }}

{{- define "sida.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ default (printf "%s%s" .Chart.AppVersion (ternary "-cuda" "" .Values.gpu.enabled)) $image.tag }}
{{- end -}}
{{- end }}

{{- define "sida.pullSecrets" -}}
{{- with concat .Values.global.imagePullSecrets .Values.imagePullSecrets | uniq }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Where a pod may run, of whatever has these values. */}}
{{- define "sida.scheduling" -}}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .schedulerName }}
schedulerName: {{ . }}
{{- end }}
{{- with include "sida.texts" .nodeSelector }}
nodeSelector:
  {{- . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "sida.podName" -}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
{{- end }}

{{/* Environment variables, whose values Kubernetes wants to be text. */}}
{{- define "sida.env" -}}
{{- range . }}
{{- if hasKey . "value" }}
- {{ toYaml (set (deepCopy .) "value" (toString .value)) | nindent 2 | trim }}
{{- else }}
- {{ toYaml . | nindent 2 | trim }}
{{- end }}
{{- end }}
{{- end }}

{{/* The families of a Service's addresses. */}}
{{- define "sida.ipFamilies" -}}
{{- with .Values.network.ipFamilyPolicy }}
ipFamilyPolicy: {{ . }}
{{- end }}
{{- with .Values.network.ipFamilies }}
ipFamilies:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Every address of the pod. */}}
{{- define "sida.anyAddress" -}}
{{ ternary "[::]" "0.0.0.0" (eq .Values.network.podIpFamily "IPv6") }}
{{- end }}

{{/* The cluster's name in etcd, and what its series carry as `job`: several releases may share etcd and Prometheus. */}}
{{- define "sida.cluster" -}}
{{ default (printf "%s.%s" .Release.Namespace (include "sida.fullname" .)) .Values.clusterName }}
{{- end }}

{{/* What chooses this release's series in a query. */}}
{{- define "sida.series" -}}
namespace="{{ .Release.Namespace }}",job="{{ include "sida.fullname" . }}"
{{- end }}

{{- define "sida.tlsSecret" -}}
{{ default (printf "%s-tls" (include "sida.fullname" .)) .Values.tls.existingSecret }}
{{- end }}

{{/* Whether the Prometheus operator's kinds are made. */}}
{{- define "sida.hasOperator" -}}
{{ or .Values.metrics.assumeOperator (.Capabilities.APIVersions.Has "monitoring.coreos.com/v1") | ternary "yes" "" }}
{{- end }}
