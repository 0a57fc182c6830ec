{{/* How the model comes to a pod: volumes, mounts and init containers. */}}

{{- define "sida.weightsVolumes" -}}
{{- $w := .Values.weights }}
{{- if has $w.source (list "pvc" "fetch") }}
- name: weights
  persistentVolumeClaim: {claimName: {{ $w.claimName }}}
{{- else if eq $w.source "image" }}
- name: weights
  image: {reference: {{ $w.image.reference | quote }}, pullPolicy: {{ $w.image.pullPolicy }}}
{{- end }}
{{- if eq $w.source "fetch" }}
- name: fetch
  configMap: {name: {{ include "sida.fullname" . }}-fetch, defaultMode: 0555}
{{- end }}
{{- end }}

{{- define "sida.weightsMount" -}}
{{- if ne .Values.weights.source "bundled" }}
- {name: weights, mountPath: /models, readOnly: true}
{{- end }}
{{- end }}

{{- define "sida.weightsInit" -}}
{{- $w := .Values.weights }}
{{- $fetches := eq $w.source "fetch" }}
{{- $verifies := and $w.verify (ne $w.source "bundled") }}
{{- if or $fetches $verifies }}
initContainers:
  {{- if $fetches }}
  - name: fetch-weights
    image: {{ $w.fetch.image }}
    securityContext:
      {{- toYaml .Values.securityContext | nindent 6 }}
    command: [sh, /fetch/fetch-weights.sh]
    env:
      - {name: FROM, value: {{ $w.fetch.from }}}
      - {name: ENDPOINT, value: {{ $w.fetch.endpoint | quote }}}
      - {name: REPOSITORY, value: {{ $w.fetch.repository | quote }}}
      - {name: REVISION, value: {{ $w.fetch.revision | quote }}}
      - {name: REGION, value: {{ $w.fetch.region | quote }}}
      - {name: FILES, value: /fetch/files}
      - {name: TARGET, value: /models/{{ $w.path }}{{ ternary ".fetched" "" $w.fetch.convert }}}
      {{- with $w.fetch.existingSecret }}
      {{- if eq $w.fetch.from "hub" }}
      - name: TOKEN
        valueFrom: {secretKeyRef: {name: {{ . }}, key: token}}
      {{- else if eq $w.fetch.from "s3" }}
      - name: AWS_ACCESS_KEY_ID
        valueFrom: {secretKeyRef: {name: {{ . }}, key: AWS_ACCESS_KEY_ID}}
      - name: AWS_SECRET_ACCESS_KEY
        valueFrom: {secretKeyRef: {name: {{ . }}, key: AWS_SECRET_ACCESS_KEY}}
      {{- end }}
      {{- end }}
    volumeMounts:
      - {name: weights, mountPath: /models}
      - {name: fetch, mountPath: /fetch, readOnly: true}
      - {name: tmp, mountPath: /tmp}
  {{- if $w.fetch.convert }}
  - name: convert-weights
    image: {{ include "sida.image" . }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    securityContext:
      {{- toYaml .Values.securityContext | nindent 6 }}
    args: [convert, /models/{{ $w.path }}.fetched, --out, /models/{{ $w.path }}, --if-missing]
    volumeMounts:
      - {name: weights, mountPath: /models}
      - {name: tmp, mountPath: /tmp}
  {{- end }}
  {{- end }}
  {{- if $verifies }}
  - name: verify-weights
    image: {{ include "sida.image" . }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    securityContext:
      {{- toYaml .Values.securityContext | nindent 6 }}
    args: [verify, {{ include "sida.modelDir" . }}]
    volumeMounts:
      - {name: weights, mountPath: /models, readOnly: true}
      - {name: tmp, mountPath: /tmp}
  {{- end }}
{{- end }}
{{- end }}
