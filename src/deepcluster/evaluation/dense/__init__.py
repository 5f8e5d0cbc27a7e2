"""Dense protocols: segmentation and detection, frozen and fine-tuned.

The paper reports detection on VOC 2007 and segmentation on VOC 2012 (section 4.3, table 2); its release has neither.
"""
