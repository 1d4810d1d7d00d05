{{- define "prefetchd.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 58 | trimSuffix "-" -}}
{{- end -}}

{{- /* Leaves room for suffixes in the 63 characters of a name. */ -}}
{{- define "prefetchd.fullname" -}}
{{- $name := include "prefetchd.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 58 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 58 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 58 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "prefetchd.selector" -}}
app.kubernetes.io/name: {{ include "prefetchd.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "prefetchd.labels" -}}
{{ include "prefetchd.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end -}}

{{- define "prefetchd.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- /* nonroot of the image. */ -}}
{{- define "prefetchd.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
# The group that may read the Secrets' files.
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "prefetchd.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- /* The Secrets that are mounted, as YAML: the file, the setting that names it, and where it comes from. */ -}}
{{- define "prefetchd.secrets" -}}
{{- $settings := list
  (dict "value" "postgresPassword" "file" "postgres-password" "setting" "PREFETCHD__POSTGRES__PASSWORD_FILE")
  (dict "value" "redisPassword" "file" "redis-password" "setting" "PREFETCHD__REDIS__PASSWORD_FILE")
  (dict "value" "adminToken" "file" "admin-token" "setting" "PREFETCHD__HTTP__ADMIN_TOKEN_FILE") -}}
{{- range $settings -}}
{{- $from := index $.Values.secrets .value -}}
{{- if $from.name }}
- {{ dict "file" .file "setting" .setting "name" $from.name "key" $from.key | toJson }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Whoever may read ConfigMaps or pods would read it. */ -}}
{{- define "prefetchd.refuseSecrets" -}}
{{- $text := printf "%s\n%s" .Values.config (toYaml .Values.env) -}}
{{- if or (regexMatch `://[^/@\s"']*:[^/@\s"']+@` $text) (regexMatch `(?i)password\s*=\s*[^\s]` $text) -}}
{{- fail "config and env must not contain a password: put it into a Secret, and name that under secrets" -}}
{{- end -}}
{{- range .Values.env -}}
{{- if and .value (regexMatch "(?i)password$" .name) -}}
{{- fail "config and env must not contain a password: put it into a Secret, and name that under secrets" -}}
{{- end -}}
{{- end -}}
{{- end -}}
