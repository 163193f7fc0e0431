"""What this machine lends: files that appear whole or not at all, devices, cores and signals."""

from ablate_shards.surgery.machine.devices import find_device, resolve_device
from ablate_shards.surgery.machine.files import write_safetensors, write_whole
from ablate_shards.surgery.machine.progress import Progress, Steps
from ablate_shards.surgery.machine.staging import Staging, check_out, locked
from ablate_shards.surgery.machine.system import cores

__all__ = [
    "Progress",
    "Staging",
    "Steps",
    "check_out",
    "cores",
    "find_device",
    "locked",
    "resolve_device",
    "write_safetensors",
    "write_whole",
]
