{{/* What no schema can say. */}}
{{- define "sida.check" -}}
{{- $v := .Values -}}
{{- include "sida.checkWeights" . -}}
{{- include "sida.checkPredictor" . -}}
{{- include "sida.checkPools" . -}}
{{- if and (gt (int $v.etcd.bundled.replicas) 1) (not $v.etcd.endpoints) (not $v.etcd.bundled.persistence.enabled) }}{{ fail "etcd.bundled.persistence: a member that comes back without its data cannot join again" }}{{ end -}}
{{- if and $v.tls.enabled (not $v.tls.existingSecret) (not $v.tls.certManager.issuerRef.name) }}{{ fail "tls: name existingSecret or certManager.issuerRef.name" }}{{ end -}}
{{- range prepend $v.expertNode.pools $v.coordinator -}}
{{- if and .autoscaling.enabled .keda.enabled }}{{ fail "coordinator and expertNode: autoscaling or keda, not both" }}{{ end -}}
{{- end -}}
{{- if and (not $v.coordinator.http.enabled) (or $v.gateway.openaiRoute.enabled (and $v.ingress.enabled (eq $v.ingress.port "http"))) }}{{ fail "coordinator.http.enabled: a route or an Ingress leads to this port" }}{{ end -}}
{{- if and (or $v.gateway.grpcRoute.enabled $v.gateway.httpRoute.enabled $v.gateway.openaiRoute.enabled) (not $v.gateway.parentRefs) }}{{ fail "gateway.parentRefs: name the gateway of the routes" }}{{ end -}}
{{- end }}

{{- define "sida.checkWeights" -}}
{{- $w := .Values.weights -}}
{{- if and $w.volume.create $w.claimName }}{{ fail "weights: claimName names a claim that exists, volume.create makes one; not both" }}{{ end -}}
{{- if and $w.volume.create (ne $w.source "fetch") }}{{ fail "weights.volume.create: a new volume is empty, so weights.source must be fetch" }}{{ end -}}
{{- if and (has $w.source (list "pvc" "fetch")) (not $w.claimName) (not $w.volume.create) }}{{ fail "weights.claimName: name the claim of the volume with the model, or let weights.volume.create make one" }}{{ end -}}
{{- if and (eq $w.source "image") (not $w.image.reference) }}{{ fail "weights.image.reference: name the image with the model" }}{{ end -}}
{{- if eq $w.source "fetch" }}{{ include "sida.checkFetch" . }}{{ end -}}
{{- end }}

{{- define "sida.checkFetch" -}}
{{- $fetch := .Values.weights.fetch -}}
{{- if not $fetch.files }}{{ fail "weights.fetch.files: list the model's files" }}{{ end -}}
{{- if and (eq $fetch.from "hub") (not (regexMatch "^[0-9a-f]{40}$" $fetch.revision)) }}{{ fail "weights.fetch.revision: pin the hub's commit, 40 digits; a branch moves" }}{{ end -}}
{{- if and (ne $fetch.from "url") (not $fetch.repository) }}{{ fail "weights.fetch.repository: say which" }}{{ end -}}
{{- $byManifest := and .Values.weights.verify (has "sida.manifest.json" (include "sida.fetchedNames" . | fromJsonArray)) -}}
{{- range $fetch.files -}}
{{- if and (not .sha256) (not $byManifest) }}{{ fail (printf "weights.fetch.files: %s has no sha256, and no sida.manifest.json that is verified covers it" .name) }}{{ end -}}
{{- end -}}
{{- end }}

{{- define "sida.checkPredictor" -}}
{{- $p := .Values.predictor -}}
{{- $source := include "sida.predictorSource" . -}}
{{- if not $source }}{{ fail "predictor.source: say `model` if predictor.safetensors lies beside the model, `none` if there is no predictor, or where else it is" }}{{ end -}}
{{- if and (eq $source "pvc") (not $p.claimName) }}{{ fail "predictor.claimName: name the claim of the volume with the predictor" }}{{ end -}}
{{- if and (eq $source "image") (not $p.image.reference) }}{{ fail "predictor.image.reference: name the image with the predictor" }}{{ end -}}
{{- if and (eq $source "fetch") (not (and $p.fetch.url $p.fetch.sha256)) }}{{ fail "predictor.fetch: give the url of the predictor and its sha256" }}{{ end -}}
{{- if and (ne $source "none") (eq (int .Values.predictorNode.replicas) 0) (eq .Values.coordinator.predictor "nodes") }}{{ fail "coordinator.predictor: there are no predictor-nodes; file or off" }}{{ end -}}
{{- end }}

{{- define "sida.checkPools" -}}
{{- $names := list -}}
{{- range .Values.expertNode.pools -}}
{{- $name := include "sida.poolName" (list $ .) -}}
{{- if gt (len $name) 52 }}{{ fail (printf "expertNode.pools: %s is longer than the 52 characters that a StatefulSet may have: shorten the pool's name or set fullnameOverride" $name) }}{{ end -}}
{{- if has $name $names }}{{ fail (printf "expertNode.pools: two are named %s" .name) }}{{ end -}}
{{- $names = append $names $name -}}
{{- end -}}
{{- end }}

{{/* The name of a pool's StatefulSet. Called with a list: the root, the pool. */}}
{{- define "sida.poolName" -}}
{{ include "sida.fullname" (first .) }}-expert-node{{ with (last .).name }}-{{ . }}{{ end }}
{{- end }}
