"""Imported before torch's companions: keeps their notes about optional parts off the terminal."""

import logging

# torchao and bitsandbytes warn of compiled parts for other devices; torch of torchao's enums.
for _name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
