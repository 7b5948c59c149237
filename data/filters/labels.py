"""The modality and body part that a text names, by its words: for balancing before any model is asked.

Only as good as the words: a legend that compares with another examination names that one too, and the first pattern
below that is found wins. Labels that a source states, or a model gives, come before these.
"""

from __future__ import annotations

import re

from data.config import BODY_PARTS, MODALITIES

# In the order in which they are looked for: what names another modality in passing stands before it.
_MODALITY_WORDS = {
    "Nuclear Imaging": r"(?-i:PET|SPECT)|scintigra\w+|positron emission",
    "Angiography": r"angiogra\w+|(?-i:DSA)",
    "Optical Coherence Tomography": r"(?-i:OCT)|optical coherence",
    "Computed Tomography": r"(?-i:CT|CBCT)|computed tomogra\w+",
    "Magnetic Resonance Imaging": r"(?-i:MRI|MR)|magnetic resonance|(?:T1|T2|FLAIR|DWI)\b.{0,12}\bweighted",
    "Ultrasound": r"ultraso\w+|sonogra\w+|echocardiogra\w+|doppler",
    "X-Ray": r"x-?rays?|radiogra\w+|mammogra\w+|(?-i:CXR)",
    "Endoscopy": r"endoscop\w+|colonoscop\w+|gastroscop\w+|bronchoscop\w+",
    "Fundus Photography": r"fundus",
    "Dermoscopy": r"dermoscop\w+|dermatoscop\w+",
    "Microscopy Images": r"microscop\w+|micrograph\w*|histolog\w+|histopatholog\w+|H&E|ha?ematoxylin|stain\w*",
    "Digital Photography": r"photo\w*",
}
_BODY_PART_WORDS = {
    "hand": "Upper Limb", "knee": "Lower Limb", "kidney": "Abdomen", "heart": "Chest", "lung": "Chest",
    "thyroid": "Neck", "retina": "Eye", "gland": "Cell", "cells": "Cell", "liver": "Abdomen",
    **{part.lower(): part for part in BODY_PARTS if part != "Others"},
}  # fmt: skip
_MODALITY = {label: re.compile(rf"\b(?:{words})\b", re.IGNORECASE) for label, words in _MODALITY_WORDS.items()}
# Where a text is nothing else: the labels themselves, and DICOM's codes (PS3.3 C.7.3.1.1.1).
_LABELS = {label.casefold(): label for label in MODALITIES} | {
    "ct": "Computed Tomography", "mr": "Magnetic Resonance Imaging", "us": "Ultrasound", "cr": "X-Ray", "dx": "X-Ray",
    "rf": "X-Ray", "mg": "X-Ray", "pt": "Nuclear Imaging", "nm": "Nuclear Imaging", "xa": "Angiography",
    "sm": "Microscopy Images", "es": "Endoscopy", "op": "Fundus Photography", "opt": "Optical Coherence Tomography",
    "xc": "Digital Photography",
}  # fmt: skip


def modality_of(text: str) -> str | None:
    """The label (or DICOM code) that the text is, or names in its own words; None where it names none."""
    if label := _LABELS.get(text.strip().casefold()):
        return label
    return next((label for label, words in _MODALITY.items() if words.search(text)), None)


def body_part_of(text: str) -> str | None:
    low = text.lower()
    return next((label for word, label in _BODY_PART_WORDS.items() if word in low), None)
