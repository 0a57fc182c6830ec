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
