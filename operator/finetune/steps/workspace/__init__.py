"""What steps leave for each other in the workspace: folders that are complete or absent (`staging`), and in them the
files that more than one step knows."""
