{{- define "step-oracle.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "step-oracle.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains (include "step-oracle.name" .) .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "step-oracle.name" .) | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "step-oracle.selector" -}}
app.kubernetes.io/name: {{ include "step-oracle.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "step-oracle.labels" -}}
{{ include "step-oracle.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: server
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "step-oracle.socket" -}}
unix:/run/step-oracle/oracle.sock
{{- end -}}

{{/* What no schema can say: combinations that would lose data or not start. */}}
{{- define "step-oracle.check" -}}
{{- if not .Values.tls.secretName -}}
{{- fail "tls.secretName is empty: in a cluster the server is reached over the network, which it refuses without TLS; name a secret with tls.crt and tls.key" -}}
{{- end -}}
{{- if not .Values.operatorToken.secretName -}}
{{- fail "operatorToken.secretName is empty: the server listens at no outside address without credentials; name a secret that holds the operator's token" -}}
{{- end -}}
{{- if eq .Values.store "sqlite" -}}
{{- if ne (int .Values.replicas) 1 -}}
{{- fail (printf "replicas is %d with the store sqlite: two pods over one database would lose changes; use 1, or store: postgres" (int .Values.replicas)) -}}
{{- end -}}
{{- if .Values.autoscaling.enabled -}}
{{- fail "autoscaling is enabled with the store sqlite, which has one pod; use store: postgres" -}}
{{- end -}}
{{- else -}}
{{- if not .Values.postgres.secretName -}}
{{- fail "postgres.secretName is empty: the store postgres needs a secret with the database's URL" -}}
{{- end -}}
{{- if not .Values.postgres.packRegistry -}}
{{- fail "postgres.packRegistry is empty: pods that share a database share their packs through an OCI registry; give HOST/REPOSITORY" -}}
{{- end -}}
{{- if and .Values.autoscaling.enabled (gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) -}}
{{- fail (printf "autoscaling.minReplicas is %d and maxReplicas %d; the first may not be the larger" (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- $needed := add (int .Values.preStopSeconds) (int .Values.drainSeconds) 5 -}}
{{- if lt (int .Values.terminationGracePeriodSeconds) (int $needed) -}}
{{- fail (printf "terminationGracePeriodSeconds is %d; preStopSeconds, drainSeconds and 5 to end need %d" (int .Values.terminationGracePeriodSeconds) (int $needed)) -}}
{{- end -}}
{{- end -}}
