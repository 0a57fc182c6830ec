{{/* The arguments of a node, and of the role those that it is given; a flag that `extraArgs` names, or `extraEnv` as SIDA_...,
is left to them. Called like sida.podTemplate, and with gpus. */}}
{{- define "sida.args" -}}
{{- $root := .root }}
{{- $v := $root.Values }}
{{- $role := .values }}
{{- $any := include "sida.anyAddress" $root }}
{{- $args := list
  "--name=$(POD_NAME)"
  (printf "--cluster=%s" (include "sida.cluster" $root))
  (printf "--etcd=%s" (include "sida.etcdEndpoints" $root))
  (printf "--listen=%s:50051" $any)
  (printf "--advertise=%s:50051" (eq $v.network.podIpFamily "IPv6" | ternary "[$(POD_IP)]" "$(POD_IP)"))
  (printf "--metrics-listen=%s:9090" $any)
  (printf "--model=%s" (include "sida.modelDir" $root))
  (printf "--threads=%v" $role.threads)
  (printf "--drain=%vs" $role.drainSeconds)
  (printf "--lease-ttl=%s" $v.leaseTtl)
  (printf "--relist-interval=%s" $v.relistInterval)
  (printf "--moves-per-minute=%v" $v.movesPerMinute)
  (printf "--replicas=%v" $v.replicasPerExpert)
  (printf "--log=%s" $v.log.filter)
  (printf "--log-format=%s" $v.log.format)
}}
{{- with $v.tracing.endpoint }}
{{- $args = concat $args (list (printf "--otlp-endpoint=%s" .) (printf "--otlp-sampling=%v" $v.tracing.sampling)) }}
{{- end }}
{{- if $v.etcd.tls.existingSecret }}
{{- $args = append $args "--etcd-ca=/etc/sida/etcd/ca.crt" }}
{{- if $v.etcd.tls.mutual }}{{ $args = concat $args (list "--etcd-cert=/etc/sida/etcd/tls.crt" "--etcd-key=/etc/sida/etcd/tls.key") }}{{ end }}
{{- end }}
{{- with $v.etcd.auth.user }}
{{- $args = concat $args (list (printf "--etcd-user=%s" .) "--etcd-password-file=/etc/sida/etcd-auth/password") }}
{{- end }}
{{- if $v.tls.enabled }}
{{- $args = concat $args (list "--tls-cert=/etc/sida/tls/tls.crt" "--tls-key=/etc/sida/tls/tls.key" "--tls-ca=/etc/sida/tls/ca.crt" (printf "--tls-domain=%s" (include "sida.fullname" $root))) }}
{{- if $v.tls.mutual }}{{ $args = append $args "--tls-client-ca=/etc/sida/tls/ca.crt" }}{{ end }}
{{- if and $v.tls.mutual $v.tls.clientNames (ne .role "coordinator") }}{{ $args = append $args (printf "--tls-client-names=%s" (join "," $v.tls.clientNames)) }}{{ end }}
{{- end }}
{{- if and (eq .role "coordinator") $v.coordinator.http.enabled }}{{ $args = append $args (printf "--http-listen=%s:8000" $any) }}
{{- with $v.coordinator.http.corsOrigins }}{{ $args = append $args (printf "--http-cors-origins=%s" (join "," .)) }}{{ end }}
{{- end }}
{{- if and $v.apiKeys.existingSecret (eq .role "coordinator") }}{{ $args = append $args (printf "--api-keys=/etc/sida/api-keys/%s" $v.apiKeys.key) }}{{ end }}
{{- if $v.clusterKey.existingSecret }}{{ $args = append $args (printf "--cluster-key=/etc/sida/cluster-key/%s" $v.clusterKey.key) }}{{ end }}
{{- $args = concat $args .args }}
{{- with $v.weights.name }}{{ $args = append $args (printf "--model-name=%s" .) }}{{ end }}
{{- range include "sida.valuesOfFlags" .role | fromJsonArray }}
{{- $value := get $role . }}
{{- if kindIs "bool" $value }}
{{- if $value }}{{ $args = append $args (printf "--%s" (kebabcase .)) }}{{ end }}
{{- else if ne (toString $value) "" }}{{ $args = append $args (printf "--%s=%v" (kebabcase .) $value) }}{{ end }}
{{- end }}
{{- if .gpus }}
{{- /* A container sees its own GPU only. */}}
{{- $args = append $args "--device=cuda:0" }}
{{- with $v.gpu.precision }}{{ $args = append $args (printf "--precision=%s" .) }}{{ end }}
{{- end }}
{{- $overridden := list }}
{{- range $role.extraArgs }}{{ $overridden = append $overridden (splitList "=" (toString .) | first) }}{{ end }}
{{- range $role.extraEnv }}
{{- if hasPrefix "SIDA_" .name }}{{ $overridden = append $overridden (printf "--%s" (trimPrefix "SIDA_" .name | lower | replace "_" "-")) }}{{ end }}
{{- end }}
{{- range $args }}
{{- if not (has (splitList "=" . | first) $overridden) }}
- {{ . | quote }}
{{- end }}
{{- end }}
{{- range $role.extraArgs }}
- {{ toString . | quote }}
{{- end }}
{{- end }}

{{/* The values of a role that are flags of its command, as they are: `queueMax` is `--queue-max`. An empty one is left to the
node. Called with the role. */}}
{{- define "sida.valuesOfFlags" -}}
{{- $own := dict
  "coordinator" (list "cacheMemory" "noPrefixCache" "batchTokensMax" "prefillTokensMax" "sequencesMax" "microBatches" "queueMax" "queueTokensMax" "clientQueueShare" "clientRequestsPerMinute" "clientTokensPerMinute" "clientRequestsMax" "clientQueueMax" "clientQueueTokensMax" "promptTokensMax" "answerTokensMax" "requestTimeout" "planChance" "predictTimeout" "expertCallTimeout" "enforceCapacity")
  "expert-node" (list "nodeWeight" "noPacking")
  "predictor-node" (list "learn" "learnTokensMax" "learnCpuShare")
}}
{{- concat (get $own .) (list "connectionsMax" "handshakeTimeout" "idleTimeout" "stallTimeout" "keepaliveInterval" "keepaliveTimeout") | toJson }}
{{- end }}
