{{/* Where the predictor is, and how it comes to the pods that predict. */}}

{{/* The value, or what follows from the model; nothing where nobody can know. */}}
{{- define "sida.predictorSource" -}}
{{- $v := .Values -}}
{{- if $v.predictor.source -}}
{{ $v.predictor.source }}
{{- else if eq $v.weights.source "bundled" -}}
model
{{- else if eq $v.weights.source "fetch" -}}
{{ has "predictor.safetensors" (include "sida.fetchedNames" . | fromJsonArray) | ternary "model" "none" }}
{{- end -}}
{{- end }}

{{/* Where coordinators get hash tables: nodes, file or off. */}}
{{- define "sida.prediction" -}}
{{ eq (include "sida.predictorSource" .) "none" | ternary "off" .Values.coordinator.predictor }}
{{- end }}

{{/* The file, where it is not beside the model. */}}
{{- define "sida.predictorFile" -}}
{{- if has .Values.predictor.source (list "pvc" "image") -}}
/predictor/{{ .Values.predictor.path }}
{{- else if eq .Values.predictor.source "fetch" -}}
/predictor/fetched-{{ include "sida.predictorPin" . }}/{{ base .Values.predictor.fetch.url }}
{{- end -}}
{{- end }}

{{- define "sida.predictorPin" -}}
{{ .Values.predictor.fetch.sha256 | trunc 12 }}
{{- end }}

{{- define "sida.predictorVolumes" -}}
{{- $p := .Values.predictor }}
{{- if eq $p.source "pvc" }}
- name: predictor
  persistentVolumeClaim: {claimName: {{ $p.claimName }}, readOnly: true}
{{- else if eq $p.source "image" }}
- name: predictor
  image: {reference: {{ $p.image.reference | quote }}, pullPolicy: {{ $p.image.pullPolicy }}}
{{- else if eq $p.source "fetch" }}
- name: predictor
  emptyDir: {}
{{- end }}
{{- end }}

{{- define "sida.predictorMount" -}}
{{- if has .Values.predictor.source (list "pvc" "image" "fetch") }}
- {name: predictor, mountPath: /predictor, readOnly: true}
{{- end }}
{{- end }}

{{- define "sida.predictorInit" -}}
{{- if eq .Values.predictor.source "fetch" }}
- name: fetch-predictor
  {{- include "sida.fetcher" . | nindent 2 }}
  env:
    {{- include "sida.podName" . | nindent 4 }}
    - {name: FROM, value: url}
    - {name: ENDPOINT, value: {{ dir .Values.predictor.fetch.url | replace ":/" "://" | quote }}}
    - {name: BASE, value: /predictor/fetched}
    - {name: PIN, value: {{ include "sida.predictorPin" . | quote }}}
    - {name: FILES, value: {{ printf "%s %s" (base .Values.predictor.fetch.url) .Values.predictor.fetch.sha256 | quote }}}
    {{- include "sida.env" .Values.weights.fetch.extraEnv | nindent 4 }}
  volumeMounts:
    - {name: predictor, mountPath: /predictor}
    - {name: fetch, mountPath: /fetch, readOnly: true}
    - {name: tmp, mountPath: /tmp}
{{- end }}
{{- end }}
