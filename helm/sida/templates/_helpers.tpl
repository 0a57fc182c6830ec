{{/* Names, labels and the small decisions that several templates share. */}}

{{- define "sida.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 40 | trimSuffix "-" }}
{{- end -}}
{{- end }}

{{- define "sida.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "sida.labels" -}}
{{ include "sida.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
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

{{- define "sida.etcdEndpoints" -}}
{{- if .Values.etcd.endpoints -}}
{{ join "," .Values.etcd.endpoints }}
{{- else -}}
{{- $name := include "sida.fullname" . -}}
{{- range $i := until (int .Values.etcd.bundled.replicas) -}}
{{- if $i }},{{ end -}}
{{ $name }}-etcd-{{ $i }}.{{ $name }}-etcd.{{ $.Release.Namespace }}.svc:2379
{{- end -}}
{{- end -}}
{{- end }}

{{- define "sida.tlsSecret" -}}
{{ default (printf "%s-tls" (include "sida.fullname" .)) .Values.tls.existingSecret }}
{{- end }}

{{/* The directory of the model, as nodes see it. */}}
{{- define "sida.modelDir" -}}
{{- if eq .Values.weights.source "bundled" -}}
/usr/share/sida/models/switch-tiny-64
{{- else -}}
/models/{{ .Values.weights.path }}
{{- end -}}
{{- end }}

{{/* What no schema can say. */}}
{{- define "sida.check" -}}
{{- $v := .Values -}}
{{- $needsClaim := has $v.weights.source (list "pvc" "fetch") -}}
{{- if and $needsClaim (not $v.weights.claimName) }}{{ fail "weights.claimName: name the claim of the volume with the model" }}{{ end -}}
{{- if and (eq $v.weights.source "image") (not $v.weights.image.reference) }}{{ fail "weights.image.reference: name the image with the model" }}{{ end -}}
{{- if eq $v.weights.source "fetch" -}}
{{- $fetch := $v.weights.fetch -}}
{{- if not $fetch.files }}{{ fail "weights.fetch.files: list the model's files" }}{{ end -}}
{{- if and (eq $fetch.from "hub") (not $fetch.revision) }}{{ fail "weights.fetch.revision: pin the hub's commit" }}{{ end -}}
{{- if and (ne $fetch.from "url") (not $fetch.repository) }}{{ fail "weights.fetch.repository: say which" }}{{ end -}}
{{- $names := list -}}
{{- range $fetch.files }}{{ $names = append $names .name }}{{ end -}}
{{- $byManifest := and $v.weights.verify (has "sida.manifest.json" $names) -}}
{{- range $fetch.files -}}
{{- if and (not .sha256) (not $byManifest) }}{{ fail (printf "weights.fetch.files: %s has no sha256, and no sida.manifest.json that is verified covers it" .name) }}{{ end -}}
{{- end -}}
{{- if and $v.weights.verify (not $byManifest) (not $fetch.convert) }}{{ fail "weights.verify: without sida.manifest.json among the files, or weights.fetch.convert, there is nothing to check against; the files' sha256 are checked anyway" }}{{ end -}}
{{- end -}}
{{- if and (gt (int $v.etcd.bundled.replicas) 1) (not $v.etcd.endpoints) (not $v.etcd.bundled.persistence.enabled) }}{{ fail "etcd.bundled.persistence: a member that comes back without its data cannot join again" }}{{ end -}}
{{- if and $v.tls.enabled (not $v.tls.existingSecret) (not $v.tls.certManager.issuerRef.name) }}{{ fail "tls: name existingSecret or certManager.issuerRef.name" }}{{ end -}}
{{- if and (eq (int $v.predictorNode.replicas) 0) (eq $v.coordinator.predictor "nodes") }}{{ fail "coordinator.predictor: there are no predictor-nodes; file or off" }}{{ end -}}
{{- if and $v.coordinator.autoscaling.enabled $v.coordinator.keda.enabled }}{{ fail "coordinator: autoscaling or keda, not both" }}{{ end -}}
{{- end }}
