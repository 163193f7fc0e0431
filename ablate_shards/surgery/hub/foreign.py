"""What the uploads take from inside huggingface_hub, because it has no public call for it."""

from typing import TYPE_CHECKING, Any, BinaryIO, cast

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

__all__ = ["addition_of", "has_xet", "is_stored_as_text", "mark_sent", "refuses_to_copy"]


def addition_of(name: str, size: int, sha256: str, content: Any = None, sample: bytes = b"") -> "CommitOperationAdd":
    """Returns the addition of a file whose digest is known, which the client then does not read to compute it.

    huggingface_hub: ``CommitOperationAdd`` reads what it is given as soon as it is made, and can be told no digest. So
    it is made of nothing, and given its ``path_or_fileobj`` and ``upload_info`` afterwards.

    Args:
        name: The file's path in the repository.
        size: Its bytes.
        sha256: Its digest.
        content: The open file, None where its bytes are sent already.
        sample: How it begins, by which the Hub tells text from other files.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    addition = CommitOperationAdd(name, b"")
    if content is not None:
        addition.path_or_fileobj = cast(BinaryIO, content)
    addition.upload_info = UploadInfo(size=size, sample=sample, sha256=bytes.fromhex(sha256))
    return addition


def mark_sent(addition: "CommitOperationAdd") -> None:
    """Says of an addition that the Hub has its bytes, so that a commit names them and sends nothing.

    huggingface_hub: only ``preupload_lfs_files`` sets these fields, on the very object that it sent; here a later run
    commits what an earlier one sent.
    """
    addition._upload_mode, addition._should_ignore, addition._is_uploaded = "lfs", False, True


def is_stored_as_text(addition: "CommitOperationAdd") -> bool:
    """Returns whether the Hub would store a file in git, and so did not take its bytes.

    huggingface_hub: ``preupload_lfs_files`` keeps the Hub's answer in a private field, and passes over such files
    without a word.
    """
    return addition._upload_mode != "lfs"


def has_xet() -> bool:
    """Returns whether the client sends files through Xet.

    huggingface_hub: a private module tells; the public constant only tells whether a user switched it off.
    """
    from huggingface_hub.utils._runtime import is_xet_available

    return bool(is_xet_available())


def refuses_to_copy(error: BaseException | None) -> bool:
    """Returns whether it was the copying between repositories that failed, and not the commit.

    huggingface_hub: one of the three failures has an exception of its own; the others are known by the address that was
    called, and by words of the message.
    """
    from huggingface_hub.errors import FileDuplicationError, HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.url.path.endswith("/lfs-files/duplicate")
    return isinstance(error, FileDuplicationError) or (isinstance(error, ValueError) and "no xet hash" in str(error))
