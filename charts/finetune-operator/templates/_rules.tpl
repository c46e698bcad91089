{{/* What the operator may do where FineTuneJobs live: in the whole cluster, or in the namespaces that it serves. */}}
{{- define "rules" -}}
- apiGroups: [finetune.dev]
  resources: [finetunejobs]
  verbs: [get, list, watch, delete] # delete: ttlSecondsAfterFinished, ttlSecondsAfterFailed
- apiGroups: [finetune.dev]
  resources: [finetunejobs/status]
  verbs: [patch]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch]
{{- if .Values.nodeLost.forceDelete }}
- apiGroups: [""]
  resources: [pods/status] # a pod of a lost machine is said to have failed ...
  verbs: [patch]
- apiGroups: [""]
  resources: [pods] # ... and then removed
  verbs: [delete]
{{- end }}
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get, list, watch, create, patch] # patch: workspace.retain
- apiGroups: [""]
  resources: [services] # training.nodes above 1: what the pods find each other by
  verbs: [get, create]
- apiGroups: [""]
  resources: [events] # other controllers' warnings about a job's children are read, our own are written
  verbs: [list, watch, create]
{{- end -}}
