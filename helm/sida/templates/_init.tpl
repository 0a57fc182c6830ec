{{/* What every template begins with, done once for a release: values that a values file leaves empty get their defaults,
whole numbers become integers (Helm reads all numbers of a values file as floating-point ones, and writes great ones as
1.2e+06), pools get what they do not name, and what no schema can say is checked. Renders nothing. */}}
{{- define "sida.init" -}}
{{- if not (hasKey .Values "initialised") -}}
  {{- range $path, $default := .Files.Get "files/defaults.json" | fromJson -}}
    {{- include "sida.fill" (dict "into" $.Values "path" (splitList "." $path) "value" $default) -}}
  {{- end -}}
  {{- include "sida.pools" . -}}
  {{- include "sida.whole" .Values -}}
  {{- $_ := set .Values "initialised" true -}}
  {{- include "sida.check" . -}}
{{- end -}}
{{- end -}}

{{/* Sets the value at a path where there is none. */}}
{{- define "sida.fill" -}}
{{- $at := .into -}}
{{- range initial .path -}}
  {{- if not (kindIs "map" (get $at .)) -}}{{- $_ := set $at . dict -}}{{- end -}}
  {{- $at = get $at . -}}
{{- end -}}
{{- if or (not (hasKey $at (last .path))) (kindIs "invalid" (get $at (last .path))) -}}
  {{- $_ := set $at (last .path) .value -}}
{{- end -}}
{{- end -}}

{{/* `expertNode.pools` gets at least one, each with all that expertNode says and the pool does not. */}}
{{- define "sida.pools" -}}
{{- $pools := default (list (dict "name" "")) .Values.expertNode.pools -}}
{{- range $path, $_ := .Files.Get "files/defaults.json" | fromJson -}}
  {{- $keys := splitList "." $path -}}
  {{- if and (eq (first $keys) "expertNode") (ne (last $keys) "pools") -}}
    {{- $value := $.Values -}}
    {{- range $keys }}{{ $value = get $value . }}{{ end -}}
    {{- range $pools -}}
      {{- include "sida.fill" (dict "into" . "path" (rest $keys) "value" $value) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- $_ := set .Values.expertNode "pools" $pools -}}
{{- end -}}

{{- define "sida.whole" -}}
{{- $map := . -}}
{{- range $key, $value := $map -}}
  {{- if kindIs "map" $value -}}
    {{- include "sida.whole" $value -}}
  {{- else if kindIs "slice" $value -}}
    {{- $list := list -}}
    {{- range $value -}}
      {{- $one := dict "is" . -}}
      {{- include "sida.whole" $one -}}
      {{- $list = append $list $one.is -}}
    {{- end -}}
    {{- $_ := set $map $key $list -}}
  {{- else if kindIs "float64" $value -}}
    {{- if eq $value (floor $value) }}{{ $_ := set $map $key (int64 $value) }}{{ end -}}
  {{- end -}}
{{- end -}}
{{- end -}}
