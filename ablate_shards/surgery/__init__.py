"""The way from a checkpoint's headers to a verified output, in rooms: `docs/architecture.md` draws them."""
