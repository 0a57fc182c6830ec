{{/* The bundled etcd. Another number of members, or another volume, is another StatefulSet under a name of its own: the API
server lets neither be changed in place, and a member that comes to a cluster must be announced to it. Nothing in etcd is
irreplaceable, so the new one begins empty. */}}
{{- define "sida.etcdName" -}}
{{- $b := .Values.etcd.bundled -}}
{{ include "sida.fullname" . }}-etcd
{{- if $b.persistence.enabled }}-{{ $b.replicas }}-{{ printf "%v %v" $b.persistence.size $b.persistence.storageClass | sha256sum | trunc 4 }}{{ end -}}
{{- end }}

{{/* Where its members are found: below a Service that keeps its name. */}}
{{- define "sida.etcdDomain" -}}
{{ include "sida.fullname" . }}-etcd.{{ .Release.Namespace }}.svc
{{- end }}

{{- define "sida.etcdEndpoints" -}}
{{- if .Values.etcd.endpoints -}}
{{ join "," .Values.etcd.endpoints }}
{{- else -}}
{{- range $i := until (int .Values.etcd.bundled.replicas) -}}
{{- if $i }},{{ end -}}
{{ include "sida.etcdName" $ }}-{{ $i }}.{{ include "sida.etcdDomain" $ }}:2379
{{- end -}}
{{- end -}}
{{- end }}
