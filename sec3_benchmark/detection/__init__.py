"""Detection and segmentation on COCO (Tables 4 and 5, Appendix A.5): ViTDet with Mask R-CNN, its data, its measure."""
