"""DINO ViT-S/16 (Caron et al. 2021), the judge of subjects: trained on pictures alone, without names, it tells one dog from another where CLIP sees two dogs.

    eye = read_dino("vit_small_patch16_224.dino.safetensors")     # or None: from the hub
    eye.of_files(paths)                                           # [N, 384], of length 1
"""

import huggingface_hub
import timm
import torch
from torchvision import transforms

from ..clip import image_features, load_pictures
from ..files import UserError, first_line
from ..formats.checkpoint import read_checkpoint
from ..tensors import fill

NAME = "vit_small_patch16_224.dino"  # timm's; the same names and numbers as Facebook's dino_deitsmall16_pretrain.pth
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# as DINO's own evaluation prepares pictures, and CustomConcept101's; DreamBench's authors do not tell it
PREPARE = transforms.Compose([transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224), transforms.ToTensor(),
                              transforms.Normalize(MEAN, DEVIATION)])


class Eye:
    """A tower that sees pictures. encode_image: [B, 3, H, W] -> [B, dim]; key: its column in results; name: in words."""

    def __init__(self, encode_image, transform, key, name, device="cpu"):
        self.encode_image, self.transform, self.key, self.name, self.device = encode_image, transform, key, name, torch.device(device)

    def of_files(self, paths, batch_size=64):
        """[len(paths), dim] float32 of length 1, on the CPU."""
        return image_features(self, load_pictures(paths, self.transform, batch_size), self.device, torch.float32).cpu()


def read_dino(path=None, device="cpu"):
    """The `Eye` of DINO ViT-S/16, whose answer is the class token after the last norm, from a file (timm's, or Facebook's backbone) or from timm's repository
    on the hub. A `UserError` where it cannot be had."""
    if path is None:
        try:
            path = huggingface_hub.hf_hub_download(f"timm/{NAME}", "model.safetensors")
        except Exception as error:  # the hub's library raises many kinds
            raise UserError(f"DINO ViT-S/16, by which subjects are told apart, is not here and cannot be fetched ({first_line(error)}): give timm's {NAME} or "
                            "Facebook's dino_deitsmall16_pretrain.pth by --dino FILE, or do without by --dino none") from None
    model = timm.create_model(NAME, pretrained=False, num_classes=0).eval().requires_grad_(False)
    fill(model, read_checkpoint(path), path)
    return Eye(model.to(device), PREPARE, "dino", "DINO ViT-S/16", device)


def stand_in(grader):
    """An `Eye` where there is no DINO: a CLIP's image tower before its projection, which has not forgotten all that no caption names. It is no DINO, is named
    for what it is, and its numbers cannot be compared with DINO's."""
    visual = grader.clip.visual
    if not hasattr(visual, "trunk"):
        return None
    return Eye(visual.trunk, grader.transform, "stand_in", "CLIP's image tower before its projection (stands in for DINO)", grader.device)
