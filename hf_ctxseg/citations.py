"""The papers behind the heads, as BibTeX for model cards."""

from collections.abc import Mapping
from typing import Any

_DEEPLAB_V1 = """@inproceedings{chen2015semantic,
  title     = {Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs},
  author    = {Chen, Liang-Chieh and Papandreou, George and Kokkinos, Iasonas and Murphy, Kevin and Yuille, Alan L.},
  booktitle = {International Conference on Learning Representations},
  year      = {2015}
}"""
_DEEPLAB_V2 = """@article{chen2018deeplab,
  title   = {{DeepLab}: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution,
             and Fully Connected {CRFs}},
  author  = {Chen, Liang-Chieh and Papandreou, George and Kokkinos, Iasonas and Murphy, Kevin and Yuille, Alan L.},
  journal = {IEEE Transactions on Pattern Analysis and Machine Intelligence},
  volume  = {40},
  number  = {4},
  pages   = {834--848},
  year    = {2018}
}"""
_DEEPLAB_V3 = """@article{chen2017rethinking,
  title   = {Rethinking Atrous Convolution for Semantic Image Segmentation},
  author  = {Chen, Liang-Chieh and Papandreou, George and Schroff, Florian and Adam, Hartwig},
  journal = {arXiv preprint arXiv:1706.05587},
  year    = {2017}
}"""
_DEEPLAB_V3_PLUS = """@inproceedings{chen2018encoder,
  title     = {Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation},
  author    = {Chen, Liang-Chieh and Zhu, Yukun and Papandreou, George and Schroff, Florian and Adam, Hartwig},
  booktitle = {European Conference on Computer Vision},
  year      = {2018}
}"""
_NON_LOCAL = """@inproceedings{wang2018nonlocal,
  title     = {Non-local Neural Networks},
  author    = {Wang, Xiaolong and Girshick, Ross and Gupta, Abhinav and He, Kaiming},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
  year      = {2018}
}"""
PAPERS = {
    "deeplabv2": (_DEEPLAB_V1, _DEEPLAB_V2),
    "deeplabv3": (_DEEPLAB_V3,),
    "deeplabv3plus": (_DEEPLAB_V3_PLUS,),
    "nonlocal": (_NON_LOCAL,),
}


def citations(head: str, config: Mapping[str, Any]) -> list[str]:
    """List the papers of a head and of the non-local blocks that a config adds to it; none for a head not of ours.

    Args:
        head: Its name, as users type it.
        config: The content of `config.json`.
    """
    papers = list(PAPERS.get(head, ()))
    has_blocks = config.get("nonlocal_mode") or config.get("backbone_nonlocal_stages")
    return [*papers, _NON_LOCAL] if papers and has_blocks and _NON_LOCAL not in papers else papers
