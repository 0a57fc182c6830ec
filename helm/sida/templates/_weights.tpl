{{/* How the model comes to a pod: its place, volumes, mounts and init containers. */}}

{{- define "sida.fetchedNames" -}}
{{- $names := list -}}
{{- range .Values.weights.fetch.files }}{{ $names = append $names .name }}{{ end -}}
{{ toJson $names }}
{{- end }}

{{/* Twelve digits of everything that says what is fetched: another pin is another directory, so nodes of two releases each
have their own. */}}
{{- define "sida.pin" -}}
{{- $fetch := .Values.weights.fetch -}}
{{ list $fetch.from $fetch.endpoint $fetch.repository $fetch.revision $fetch.convert $fetch.files | toJson | sha256sum | trunc 12 }}
{{- end }}

{{/* The directory of the model, as nodes see it. */}}
{{- define "sida.modelDir" -}}
{{- $w := .Values.weights -}}
{{- if eq $w.source "bundled" -}}
/usr/share/sida/models/switch-tiny-64
{{- else -}}
/models/{{ $w.path }}{{ if eq $w.source "fetch" }}-{{ include "sida.pin" . }}{{ end }}
{{- end -}}
{{- end }}

{{- define "sida.weightsClaim" -}}
{{ default (printf "%s-weights" (include "sida.fullname" .)) .Values.weights.claimName }}
{{- end }}

{{- define "sida.weightsVolumes" -}}
{{- $w := .Values.weights }}
{{- if eq $w.source "pvc" }}
- name: weights
  # A claim that is ReadOnlyMany is mounted in no other way.
  persistentVolumeClaim: {claimName: {{ $w.claimName }}, readOnly: true}
{{- else if eq $w.source "fetch" }}
- name: weights
  persistentVolumeClaim: {claimName: {{ include "sida.weightsClaim" . }}}
{{- else if eq $w.source "image" }}
- name: weights
  image: {reference: {{ $w.image.reference | quote }}, pullPolicy: {{ $w.image.pullPolicy }}}
{{- end }}
{{- if or (eq $w.source "fetch") (eq .Values.predictor.source "fetch") }}
- name: fetch
  configMap: {name: {{ include "sida.fullname" . }}-fetch, defaultMode: 0555}
{{- if and (eq $w.source "fetch") $w.fetch.roleArn }}
- name: web-identity
  projected:
    sources: [{serviceAccountToken: {audience: sts.amazonaws.com, path: token}}]
{{- end }}
{{- end }}
{{- end }}

{{- define "sida.weightsMount" -}}
{{- if ne .Values.weights.source "bundled" }}
- {name: weights, mountPath: /models, readOnly: true}
{{- end }}
{{- end }}

{{- define "sida.weightsInit" -}}
{{- $w := .Values.weights }}
{{- $hasManifest := or $w.fetch.convert (has "sida.manifest.json" (include "sida.fetchedNames" . | fromJsonArray)) }}
{{- $isPlain := and (eq $w.source "fetch") (not $hasManifest) }}
{{- if eq $w.source "fetch" }}
{{- include "sida.fetchContainer" (dict "root" . "verifies" (and $w.verify $isPlain)) }}
{{- if $w.fetch.convert }}
- name: convert-weights
  {{- include "sida.initContainer" . | nindent 2 }}
  args: [convert, {{ include "sida.modelDir" . }}.fetched, --out, {{ include "sida.modelDir" . }}, --if-missing]
  volumeMounts:
    - {name: weights, mountPath: /models}
    - {name: tmp, mountPath: /tmp}
{{- end }}
{{- end }}
{{- if and $w.verify (ne $w.source "bundled") (not $isPlain) }}
- name: verify-weights
  {{- include "sida.initContainer" . | nindent 2 }}
  args: [verify, {{ include "sida.modelDir" . }}]
  volumeMounts:
    - {name: weights, mountPath: /models, readOnly: true}
    - {name: tmp, mountPath: /tmp}
{{- end }}
{{- end }}

{{/* What init containers of the node's own image have in common. */}}
{{- define "sida.initContainer" -}}
image: {{ include "sida.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  {{- toYaml .Values.securityContext | nindent 2 }}
{{- with .Values.weights.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The init container that fetches the model. Called with a dict: root, and verifies: whether it also checks what was
fetched before. */}}
{{- define "sida.fetchContainer" -}}
{{- $root := .root }}
{{- $fetch := $root.Values.weights.fetch }}
- name: fetch-weights
  {{- include "sida.fetcher" $root | nindent 2 }}
  env:
    {{- include "sida.podName" . | nindent 4 }}
    - {name: FROM, value: {{ $fetch.from }}}
    - {name: ENDPOINT, value: {{ $fetch.endpoint | quote }}}
    - {name: REPOSITORY, value: {{ $fetch.repository | quote }}}
    - {name: REVISION, value: {{ $fetch.revision | quote }}}
    - {name: REGION, value: {{ $fetch.region | quote }}}
    - {name: BASE, value: /models/{{ $root.Values.weights.path }}}
    - {name: PIN, value: {{ include "sida.pin" $root | quote }}}
    - {name: CONVERT, value: {{ ternary "yes" "" $fetch.convert | quote }}}
    - {name: VERIFY, value: {{ ternary "yes" "" .verifies | quote }}}
    - {name: KEEP, value: {{ $fetch.keep | quote }}}
    - {name: LEASE, value: {{ $fetch.leaseSeconds | quote }}}
    - name: FILES
      value: |
        {{- range $fetch.files }}
        {{ .name }} {{ default "-" .sha256 }}
        {{- end }}
    {{- if eq $fetch.from "s3" }}
    {{- include "sida.s3Env" $fetch | nindent 4 }}
    {{- else if and (eq $fetch.from "hub") $fetch.existingSecret }}
    - name: TOKEN
      valueFrom: {secretKeyRef: {name: {{ $fetch.existingSecret }}, key: token}}
    {{- end }}
    {{- include "sida.env" $fetch.extraEnv | nindent 4 }}
  volumeMounts:
    - {name: weights, mountPath: /models}
    - {name: fetch, mountPath: /fetch, readOnly: true}
    - {name: tmp, mountPath: /tmp}
    {{- if $fetch.roleArn }}
    - {name: web-identity, mountPath: /var/run/web-identity, readOnly: true}
    {{- end }}
{{- end }}

{{- define "sida.fetcher" -}}
image: {{ .Values.weights.fetch.image }}
securityContext:
  {{- toYaml .Values.securityContext | nindent 2 }}
{{- with .Values.weights.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
command: [sh, /fetch/fetch-weights.sh]
{{- end }}

{{/* Who the pod is to S3. */}}
{{- define "sida.s3Env" -}}
{{- $fetch := . }}
{{- if .existingSecret }}
{{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" "AWS_SESSION_TOKEN" }}
- name: {{ . }}
  valueFrom: {secretKeyRef: {name: {{ $fetch.existingSecret }}, key: {{ . }}, optional: {{ eq . "AWS_SESSION_TOKEN" }}}}
{{- end }}
{{- end }}
{{- with .roleArn }}
- {name: AWS_ROLE_ARN, value: {{ . | quote }}}
- {name: AWS_WEB_IDENTITY_TOKEN_FILE, value: /var/run/web-identity/token}
{{- end }}
{{- with .stsEndpoint }}
- {name: AWS_ENDPOINT_URL_STS, value: {{ . | quote }}}
{{- end }}
{{- end }}
