"""What tests do with any store that fsspec opens: put a folder there, and take a look at one."""

from raw_checkpoints import snapshot


def fill(store, place, folder) -> None:
    """Puts a folder's files at a place."""
    for name, data in snapshot(folder).items():
        store.pipe(f"{place}/{name}", data)


def held(store, place) -> dict[str, bytes]:
    """Returns every file at a place by relative name, as :func:`snapshot` does of a folder."""
    store.invalidate_cache()
    return {path.removeprefix(f"{place}/"): store.cat_file(path) for path in store.find(place)}
