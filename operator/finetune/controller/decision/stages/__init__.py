"""The stages of a job. Each module holds one: its manifest, and what its children say about how it went. All pure."""
