"""The HTTP face of Clarion: routes, decoding, problems. `app.create_app` puts it together."""
