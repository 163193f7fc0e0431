"""Where results go: a folder, an object store, the Hub; and the model card."""
