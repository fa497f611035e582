"""Dialogues: loaded, validated, rendered with chat templates, and masked for supervision."""
