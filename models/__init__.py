"""Demonstration networks, written from their papers in plain PyTorch.

Every module has two functions: ``build()`` returns the network in eval mode, always with the
same weights, and ``example_inputs()`` returns a tuple of inputs to call it with.  The weights are
random but for ``digits``, which is trained.

================  ======================================  ==========  ======
module            network and paper                       parameters  GFLOPs
================  ======================================  ==========  ======
googlenet         GoogLeNet with batch normalisation,      7,005,832    3.17
                  arXiv:1409.4842
inception_v3      Inception-v3, arXiv:1512.00567          23,834,568   11.43
squeezenet        SqueezeNet 1.1, arXiv:1602.07360         1,235,496    0.70
resnet50          ResNet-50, arXiv:1512.03385             25,557,032    8.18
resnext50         ResNeXt-50 32x4d, arXiv:1611.05431      25,028,904    8.46
densenet121       DenseNet-121, arXiv:1608.06993           7,978,856    5.67
mobilenet_v2      MobileNetV2 1.0, arXiv:1801.04381        3,504,872    0.60
shufflenet_v2     ShuffleNet V2 1.0, arXiv:1807.11164      2,278,604    0.29
efficientnet_b0   EfficientNet-B0, arXiv:1905.11946        5,288,548    0.77
repvgg_a0         RepVGG-A0 in its training form,          9,108,968    3.02
                  arXiv:2101.03697
unet              U-Net with 32 base channels,             7,763,521    6.04
                  arXiv:1505.04597
yolo_neck         neck and heads of YOLOv8n,               1,884,528    5.59
                  arXiv:1803.01534
vit_tiny          Vision Transformer, tiny,                5,717,416    2.51
                  arXiv:2010.11929 and arXiv:2012.12877
digits            handwritten digits, trained: a block of      14,670   0.001
                  each kind that the others consist of
================  ======================================  ==========  ======

The FLOPs are those of one example input, counted by ``torch.utils.flop_counter``: two for each
multiply-add of a convolution or matrix product (those within attention included, which needs
``SDPBackend.MATH`` on the CPU), none for anything else.
"""
