"""The cluster's side: what is read from the API server, what is written to it, and which replica may."""
