"""Descriptions of families lie in families/rows.py, rows of tensors in store.py; packed steps look for both here."""

from dit_accel.families.rows import Family as Family
from dit_accel.families.rows import Stack as Stack
from dit_accel.store import put as put
from dit_accel.store import take as take
