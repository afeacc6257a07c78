"""Small helpers without a subject of their own: files, JSON, secrets, text for a terminal, notebook
views."""
