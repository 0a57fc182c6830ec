{{/* How many pods a Deployment or StatefulSet asks for. Called with a dict: root, values (of the role), kind, name. Where an
autoscaler decides, it is what runs now: a manifest that says nothing makes the API server go back to one, and one that
says the value undoes what the autoscaler did. Offline nobody can be asked, and nothing is said. */}}
{{- define "sida.replicas" -}}
{{- if or .values.autoscaling.enabled .values.keda.enabled }}
{{- with lookup "apps/v1" .kind .root.Release.Namespace .name }}
replicas: {{ .spec.replicas }}
{{- end }}
{{- else }}
replicas: {{ .values.replicas }}
{{- end }}
{{- end }}

{{- define "sida.minReplicas" -}}
{{ .autoscaling.minReplicas | default .replicas }}
{{- end }}

{{/* A HorizontalPodAutoscaler. Called like the above, and with component. */}}
{{- define "sida.hpa" -}}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {{ .name }}
  labels:
    {{- include "sida.labels" (list .root .component) | nindent 4 }}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: {{ .kind }}, name: {{ .name }}}
  minReplicas: {{ include "sida.minReplicas" .values }}
  maxReplicas: {{ .values.autoscaling.maxReplicas }}
  metrics:
    - type: Resource
      resource: {name: cpu, target: {type: Utilization, averageUtilization: {{ .values.autoscaling.targetCpuPercent }}}}
{{- end }}

{{/* KEDA's ScaledObject. Called like the above, and with query, threshold and metricType. */}}
{{- define "sida.scaledObject" -}}
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  name: {{ .name }}
  labels:
    {{- include "sida.labels" (list .root .component) | nindent 4 }}
spec:
  scaleTargetRef: {kind: {{ .kind }}, name: {{ .name }}}
  minReplicaCount: {{ include "sida.minReplicas" .values }}
  maxReplicaCount: {{ .values.autoscaling.maxReplicas }}
  triggers:
    - type: prometheus
      metricType: {{ .metricType }}
      metadata:
        serverAddress: {{ .values.keda.prometheusAddress | quote }}
        query: {{ .query | quote }}
        threshold: {{ .threshold | quote }}
{{- end }}
