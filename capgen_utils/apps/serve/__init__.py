"""A web service around captioners: uploads in, captions out (``capgen serve``)."""
