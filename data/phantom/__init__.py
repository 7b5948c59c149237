"""A procedural demonstration data set: synthetic pictures in the manner of medical images, with exact ground truth.

`python -m data.phantom --out DIR --train N --test N --seed S` draws pictures that look roughly like X-ray, CT,
MRI, ultrasound, histology and fundus images, and writes captions and questions about them in PubMedVision's own
layout plus a held-out multiple-choice test. Nothing in it is medical data or says anything about medicine; it is
there so that a training run can be shown to learn to see. No question can be answered from its text: over each
kind of question the answers, and the letters of the right options, are balanced.

Record i of a split is a pure function of (seed, split, i), so records can be drawn in parallel and a larger
number keeps the smaller one's records as its beginning.
"""
