"""The card that a log names."""

from collections.abc import Callable

import pytest

from ullage.doctor import Diagnosis

LLAMA = "load_tensors:        CUDA0 model buffer size =  3281.35 MiB\nmain: server is listening\n"


@pytest.mark.parametrize(
    ("line", "device"),
    [
        ("  Device 0: NVIDIA GeForce RTX 4090, compute capability 8.9, VMM: yes", "rtx-4090"),
        ("  Device 0: NVIDIA GeForce RTX 4070 Ti SUPER, compute capability 8.9",
         "rtx-4070-ti-super"),
        ("llama_model_load_from_file_impl: using device CUDA0 (NVIDIA GeForce RTX 3090) - 23755 "
         "MiB free", "rtx-3090"),
        ("0.00.228 I   - CUDA0   : NVIDIA GeForce RTX 3090 (24123 MiB, 23755 MiB free)",
         "rtx-3090"),
        ("common_memory_breakdown_print: |   - CUDA0 (RTX 4090) | 24080 = 9436 + (14193 = 13169 +"
         "      38 +     985) +         451 |", "rtx-4090"),
        ("Config file not found at E=128,N=768,device_name=NVIDIA_H100_80GB_HBM3.json",
         "h100-80gb"),
        ("  Device 0: NVIDIA Unheard Of, compute capability 8.9", ""),
        ("  Device 0: NVIDIA L4, compute capability 8.9\n  Device 1: Tesla T4, compute "
         "capability 7.5", ""),
    ],
)  # fmt: skip
def test_the_catalogs_name_of_one_card(
    diagnosed: Callable[[str], Diagnosis], line: str, device: str
) -> None:
    assert diagnosed(f"{line}\n" + "\n" * 9 + LLAMA).device == device
