"""float16 to float32 and back, for large arrays.

numpy converts half floats one by one in software; whole-array integer arithmetic is several times
faster. Both rely on float16 being float32 with fewer bits: shifted into place and scaled by a power
of two, the exponents agree.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MANTISSA_SHIFT = 13  # float32 has 13 more bits of mantissa
_SIGN_AND_MAGNITUDE = np.int32(-(1 << 31) | (0x7FFF << _MANTISSA_SHIFT))
_HALF_STEP = np.int32(1 << (_MANTISSA_SHIFT - 1))
_SIGN = np.int32(0x8000)
_TO_WIDE_EXPONENT, _TO_HALF_EXPONENT = np.float32(2.0**112), np.float32(2.0**-112)  # 127 - 15


def widen(halves: NDArray[np.float16]) -> NDArray[np.float32]:
    """The same numbers in float32; infinities and NaN become numbers of at least 65,536."""
    bits = halves.view(np.int16).astype(np.int32)  # the sign fills the upper bits
    bits <<= _MANTISSA_SHIFT
    bits &= _SIGN_AND_MAGNITUDE
    wide = bits.view(np.float32)
    wide *= _TO_WIDE_EXPONENT
    return wide


def narrow_into(wide: NDArray[np.float32], halves: NDArray[np.float16]) -> None:
    """Round ``wide`` to the nearest float16 (ties away from zero) into ``halves``, for magnitudes
    below 65,520. Destroys ``wide``."""
    wide *= _TO_HALF_EXPONENT
    bits = wide.view(np.int32)
    bits += _HALF_STEP  # may carry into the exponent, which is what rounding up does
    bits >>= _MANTISSA_SHIFT
    signs = bits >> 3
    signs &= _SIGN
    bits |= signs
    # Bits 18 and above repeat the sign: dropped by the cast.
    np.copyto(halves.view(np.uint16), bits, casting="unsafe")
