{{/* A route of the gateway API to the coordinators. Called with a dict: root, kind, values, port of their Service, and what
the route's name ends with. */}}
{{- define "sida.route" -}}
{{- $gateway := .root.Values.gateway -}}
apiVersion: gateway.networking.k8s.io/v1
kind: {{ .kind }}
metadata:
  name: {{ include "sida.fullname" .root }}{{ .suffix }}
  labels:
    {{- include "sida.labels" (list .root "coordinator") | nindent 4 }}
  {{- include "sida.annotations" $gateway.annotations | nindent 2 }}
spec:
  parentRefs:
    {{- toYaml $gateway.parentRefs | nindent 4 }}
  {{- with $gateway.hostnames }}
  hostnames:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  rules:
    - backendRefs: [{name: {{ include "sida.fullname" .root }}, port: {{ .port }}}]
      {{- with .values.filters }}
      filters:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .values.timeouts }}
      timeouts:
        {{- toYaml . | nindent 8 }}
      {{- end }}
{{- end }}
