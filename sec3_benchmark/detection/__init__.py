"""Detection and segmentation on COCO (Tables 4, 5, Appendix A.5): ViTDet with Mask R-CNN, data, average precision."""
