{{/* The pod of a role. Called with a dict: root, role (its command and component), values (of the role), args. A pool has
`pool`, its name, and `predicts` says whether the role reads a predictor. */}}

{{- define "sida.podTemplate" -}}
{{- $root := .root }}
{{- $v := $root.Values }}
{{- $role := .values }}
{{- $gpus := ternary (int (default 0 $role.gpus)) 0 $v.gpu.enabled }}
{{- $call := merge (dict "gpus" $gpus) . }}
metadata:
  labels:
    {{- include "sida.labels" (list $root .role (merge (dict) (include "sida.poolLabel" . | fromYaml) $role.podLabels)) | nindent 4 }}
  {{- include "sida.annotations" (merge (dict "kubectl.kubernetes.io/default-container" .role) $role.podAnnotations) | nindent 2 }}
spec:
  serviceAccountName: {{ include "sida.serviceAccount" $root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- include "sida.pullSecrets" $root | nindent 2 }}
  securityContext:
    {{- toYaml $v.podSecurityContext | nindent 4 }}
  terminationGracePeriodSeconds: {{ add $role.drainSeconds 15 }}
  {{- with $role.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- include "sida.scheduling" (ternary (merge (dict "tolerations" (concat $role.tolerations $v.gpu.tolerations | uniq)) $role) $role (gt $gpus 0)) | nindent 2 }}
  topologySpreadConstraints:
    {{- if $role.topologySpreadConstraints }}
    {{- toYaml $role.topologySpreadConstraints | nindent 4 }}
    {{- else }}
    {{- include "sida.spread" . | nindent 4 }}
    {{- end }}
  {{- with include "sida.initContainers" . | trim }}
  initContainers:
    {{- . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ .role }}
      image: {{ include "sida.image" $root }}
      imagePullPolicy: {{ $v.image.pullPolicy }}
      securityContext:
        {{- toYaml $v.securityContext | nindent 8 }}
      args:
        - {{ .role }}
        {{- include "sida.args" $call | nindent 8 }}
      env:
        {{- include "sida.podName" . | nindent 8 }}
        - name: POD_IP
          valueFrom: {fieldRef: {fieldPath: status.podIP}}
        {{- include "sida.env" $role.extraEnv | nindent 8 }}
      {{- with $role.extraEnvFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      ports:
        - {name: grpc, containerPort: 50051, protocol: TCP}
        - {name: metrics, containerPort: 9090, protocol: TCP}
        {{- if and (eq .role "coordinator") $role.http.enabled }}
        - {name: http, containerPort: 8000, protocol: TCP}
        {{- end }}
        {{- with $role.extraPorts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- include "sida.probes" $root | nindent 6 }}
      resources:
        {{- $resources := deepCopy $role.resources }}
        {{- if $gpus }}
        {{- $resources = mergeOverwrite $resources (dict "limits" (dict (default $v.gpu.resource $role.gpuResource) $gpus)) }}
        {{- end }}
        {{- toYaml $resources | nindent 8 }}
      volumeMounts:
        {{- include "sida.mounts" . | nindent 8 }}
  volumes:
    {{- include "sida.volumes" . | nindent 4 }}
{{- end }}

{{- define "sida.poolLabel" -}}
{{- with .pool }}sida/pool: {{ . | quote }}{{ end -}}
{{- end }}

{{/* Whose pods they are: those of a release, a role and a pool. */}}
{{- define "sida.podSelector" -}}
{{ include "sida.selector" .root }}
app.kubernetes.io/component: {{ .role }}
{{- with include "sida.poolLabel" . }}
{{ . }}
{{- end }}
{{- end }}

{{- define "sida.spread" -}}
- maxSkew: 1
  topologyKey: kubernetes.io/hostname
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels:
      {{- include "sida.podSelector" . | nindent 6 }}
{{- end }}

{{- define "sida.initContainers" -}}
{{- include "sida.weightsInit" .root }}
{{- if .predicts }}{{ include "sida.predictorInit" .root }}{{ end }}
{{- with .values.initContainers }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "sida.mounts" -}}
{{- $v := .root.Values -}}
- {name: tmp, mountPath: /tmp}
{{- if .values.shmSize }}
- {name: shm, mountPath: /dev/shm}
{{- end }}
{{- if .values.learn }}
- {name: learnt, mountPath: /learnt}
{{- end }}
{{- include "sida.weightsMount" .root }}
{{- if .predicts }}{{ include "sida.predictorMount" .root }}{{ end }}
{{- if $v.tls.enabled }}
- {name: tls, mountPath: /etc/sida/tls, readOnly: true}
{{- end }}
{{- if and $v.apiKeys.existingSecret (eq .role "coordinator") }}
- {name: api-keys, mountPath: /etc/sida/api-keys, readOnly: true}
{{- end }}
{{- if $v.clusterKey.existingSecret }}
- {name: cluster-key, mountPath: /etc/sida/cluster-key, readOnly: true}
{{- end }}
{{- if $v.etcd.tls.existingSecret }}
- {name: etcd-tls, mountPath: /etc/sida/etcd, readOnly: true}
{{- end }}
{{- if $v.etcd.auth.user }}
- {name: etcd-auth, mountPath: /etc/sida/etcd-auth, readOnly: true}
{{- end }}
{{- with .values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "sida.volumes" -}}
{{- $v := .root.Values -}}
- name: tmp
  emptyDir: {}
{{- with .values.shmSize }}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ . }}}
{{- end }}
{{- if .values.learn }}
- name: learnt
  emptyDir: {}
{{- end }}
{{- include "sida.weightsVolumes" .root }}
{{- if .predicts }}{{ include "sida.predictorVolumes" .root }}{{ end }}
{{- if $v.tls.enabled }}
- name: tls
  secret: {secretName: {{ include "sida.tlsSecret" .root }}, defaultMode: 0440}
{{- end }}
{{- if and $v.apiKeys.existingSecret (eq .role "coordinator") }}
- name: api-keys
  secret: {secretName: {{ $v.apiKeys.existingSecret }}, defaultMode: 0440}
{{- end }}
{{- with $v.clusterKey.existingSecret }}
- name: cluster-key
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- with $v.etcd.tls.existingSecret }}
- name: etcd-tls
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- if $v.etcd.auth.user }}
- name: etcd-auth
  secret: {secretName: {{ required "etcd.auth.existingSecret: the secret with the password" $v.etcd.auth.existingSecret }}, defaultMode: 0440}
{{- end }}
{{- with .values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}
