"""A web service around captioners: uploads in, captions out; see ``app.create_app`` and ``capgen
serve``."""
