{{/* The pod of a role. Called with a dict: root, component (its label), role (the command), values (of the role), args,
gpus. */}}

{{- define "sida.podTemplate" -}}
{{- $root := .root }}
{{- $v := $root.Values }}
{{- $role := .values }}
{{- $gpus := ternary (int .gpus) 0 $v.gpu.enabled }}
{{- $args := .args }}
{{- if $gpus }}
{{- /* A container sees its own GPU only. */}}
{{- $args = append $args "--device=cuda:0" }}
{{- with $v.gpu.precision }}{{ $args = append $args (printf "--precision=%s" .) }}{{ end }}
{{- end }}
metadata:
  labels:
    {{- include "sida.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
    {{- with $role.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    kubectl.kubernetes.io/default-container: {{ .component }}
    {{- with $role.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "sida.serviceAccount" $root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- with $v.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- toYaml $v.podSecurityContext | nindent 4 }}
  terminationGracePeriodSeconds: {{ add $role.drainSeconds 15 }}
  {{- with $role.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $role.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $role.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $role.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $role.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  topologySpreadConstraints:
    {{- if $role.topologySpreadConstraints }}
    {{- toYaml $role.topologySpreadConstraints | nindent 4 }}
    {{- else }}
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "sida.selector" $root | nindent 10 }}
          app.kubernetes.io/component: {{ .component }}
    {{- end }}
  {{- include "sida.weightsInit" $root | nindent 2 }}
  containers:
    - name: {{ .component }}
      image: {{ include "sida.image" $root }}
      imagePullPolicy: {{ $v.image.pullPolicy }}
      securityContext:
        {{- toYaml $v.securityContext | nindent 8 }}
      args:
        - {{ .role }}
        - --name=$(POD_NAME)
        - --cluster={{ default $root.Release.Name $v.clusterName }}
        - --etcd={{ include "sida.etcdEndpoints" $root }}
        - --listen=0.0.0.0:50051
        - --advertise=$(POD_IP):50051
        - --metrics-listen=0.0.0.0:9090
        - --model={{ include "sida.modelDir" $root }}
        - --threads={{ $role.threads }}
        - --drain={{ $role.drainSeconds }}s
        - --lease-ttl={{ $v.leaseTtl }}
        - --moves-per-minute={{ $v.movesPerMinute }}
        - --replicas={{ $v.replicasPerExpert }}
        - --log={{ $v.log.filter }}
        - --log-format={{ $v.log.format }}
        {{- if $v.tracing.endpoint }}
        - --otlp-endpoint={{ $v.tracing.endpoint }}
        - --otlp-sampling={{ $v.tracing.sampling }}
        {{- end }}
        {{- if $v.etcd.tls.existingSecret }}
        - --etcd-ca=/etc/sida/etcd/ca.crt
        {{- if $v.etcd.tls.mutual }}
        - --etcd-cert=/etc/sida/etcd/tls.crt
        - --etcd-key=/etc/sida/etcd/tls.key
        {{- end }}
        {{- end }}
        {{- if $v.etcd.auth.user }}
        - --etcd-user={{ $v.etcd.auth.user }}
        - --etcd-password-file=/etc/sida/etcd-auth/password
        {{- end }}
        {{- if $v.tls.enabled }}
        - --tls-cert=/etc/sida/tls/tls.crt
        - --tls-key=/etc/sida/tls/tls.key
        - --tls-ca=/etc/sida/tls/ca.crt
        - --tls-domain={{ include "sida.fullname" $root }}
        {{- if $v.tls.mutual }}
        - --tls-client-ca=/etc/sida/tls/ca.crt
        {{- end }}
        {{- end }}
        {{- range $args }}
        - {{ . }}
        {{- end }}
        {{- range $role.extraArgs }}
        - {{ . | quote }}
        {{- end }}
      env:
        - name: POD_NAME
          valueFrom: {fieldRef: {fieldPath: metadata.name}}
        - name: POD_IP
          valueFrom: {fieldRef: {fieldPath: status.podIP}}
        {{- with $role.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with $role.extraEnvFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      ports:
        - {name: grpc, containerPort: 50051, protocol: TCP}
        - {name: metrics, containerPort: 9090, protocol: TCP}
      {{- include "sida.probes" $root | nindent 6 }}
      resources:
        {{- $resources := deepCopy $role.resources }}
        {{- if $gpus }}
        {{- $resources = mergeOverwrite $resources (dict "limits" (dict $v.gpu.resource $gpus)) }}
        {{- end }}
        {{- toYaml $resources | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        {{- if $role.shmSize }}
        - {name: shm, mountPath: /dev/shm}
        {{- end }}
        {{- include "sida.weightsMount" $root | nindent 8 }}
        {{- if $v.tls.enabled }}
        - {name: tls, mountPath: /etc/sida/tls, readOnly: true}
        {{- end }}
        {{- if $v.etcd.tls.existingSecret }}
        - {name: etcd-tls, mountPath: /etc/sida/etcd, readOnly: true}
        {{- end }}
        {{- if $v.etcd.auth.user }}
        - {name: etcd-auth, mountPath: /etc/sida/etcd-auth, readOnly: true}
        {{- end }}
        {{- with $role.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {}
    {{- if $role.shmSize }}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $role.shmSize }}}
    {{- end }}
    {{- include "sida.weightsVolumes" $root | nindent 4 }}
    {{- if $v.tls.enabled }}
    - name: tls
      secret: {secretName: {{ include "sida.tlsSecret" $root }}, defaultMode: 0440}
    {{- end }}
    {{- with $v.etcd.tls.existingSecret }}
    - name: etcd-tls
      secret: {secretName: {{ . }}, defaultMode: 0440}
    {{- end }}
    {{- if $v.etcd.auth.user }}
    - name: etcd-auth
      secret: {secretName: {{ required "etcd.auth.existingSecret: the secret with the password" $v.etcd.auth.existingSecret }}, defaultMode: 0440}
    {{- end }}
    {{- with $role.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{/* Kubernetes asks by gRPC; where that wants TLS, which the kubelet cannot, by HTTP on the metrics port: the same
answers. What a node waits for (its model, etcd, other nodes) makes it unready and never kills it. */}}
{{- define "sida.probes" -}}
{{- $p := .Values.probes }}
{{- $live := dict "grpc" (dict "port" 50051 "service" "liveness") }}
{{- $ready := dict "grpc" (dict "port" 50051) }}
{{- if .Values.tls.enabled }}
{{- $live = dict "httpGet" (dict "port" "metrics" "path" "/healthz") }}
{{- $ready = dict "httpGet" (dict "port" "metrics" "path" "/readyz") }}
{{- end -}}
startupProbe:
  {{- toYaml $live | nindent 2 }}
  periodSeconds: 2
  timeoutSeconds: {{ $p.timeoutSeconds }}
  failureThreshold: {{ div $p.startupSeconds 2 }}
readinessProbe:
  {{- toYaml $ready | nindent 2 }}
  periodSeconds: {{ $p.periodSeconds }}
  timeoutSeconds: {{ $p.timeoutSeconds }}
  failureThreshold: 2
livenessProbe:
  {{- toYaml $live | nindent 2 }}
  periodSeconds: {{ $p.periodSeconds }}
  timeoutSeconds: {{ $p.timeoutSeconds }}
  failureThreshold: {{ max 1 (div $p.livenessSeconds $p.periodSeconds) }}
{{- end }}
