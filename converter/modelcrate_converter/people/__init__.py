"""Procedural people: scenes of drawn, articulated figures with exact ground truth, for training, calibration, parity and accuracy without any download.

`body` poses a figure in space, `drawing` paints it, `scenes` composes images and their annotations, `dataset` writes COCO files and video.
"""

from modelcrate_converter.people.scenes import DATA_VERSION, Person, Scene, draw_scene, procedural_scenes

__all__ = ["DATA_VERSION", "Person", "Scene", "draw_scene", "procedural_scenes"]
