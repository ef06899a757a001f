"""Tiny models with the blocks of timm, Meta's DINOv2 and DINOv3, Microsoft's Swin and `rfdetr`.

The libraries themselves need torchvision, of which there is no CPU build, or are no packages. These blocks have the
same class names, the same names of modules and parameters, and the same order of operations.
"""

import torch
import torch.nn.functional as F
from torch import nn

DIM, HEADS = 16, 2


class LayerNorm(nn.LayerNorm):
    """timm's has a forward of its own, so internal adapters cannot change it."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((DIM,), 0.1))

    def forward(self, x):
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(DIM, 2 * DIM)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(2 * DIM, DIM)
        self.drop2 = nn.Dropout(0.0)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class SwiGLUFFN(nn.Module):
    """The MLP of Meta's largest DINOv2."""

    def __init__(self):
        super().__init__()
        self.w12 = nn.Linear(DIM, 4 * DIM)
        self.w3 = nn.Linear(2 * DIM, DIM)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def attend(qkv):
    q, k, v = qkv.unflatten(-1, (3, HEADS, DIM // HEADS)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x):
        return self.proj(attend(self.qkv(x)))


class BiasedAttention(nn.Module):
    """Attention that reads the weight of `qkv`, and has the biases of query and value apart."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(DIM)), nn.Parameter(torch.zeros(DIM))
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x):
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return self.proj(attend(F.linear(x, self.qkv.weight, bias)))


class CosineAttention(BiasedAttention):
    """Swinv2's, with the network of its position bias."""

    def __init__(self):
        super().__init__()
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, HEADS, bias=False))


class Block(nn.Module):
    """timm's and Meta's, with and without LayerScale."""

    def __init__(self, scale=nn.Identity, mlp=Mlp):
        nn.Module.__init__(self)
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn, self.mlp = Attention(), mlp()
        self.ls1, self.ls2 = scale(), scale()
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()

    def forward(self, x):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class EvaBlock(nn.Module):
    """timm's EVA, and its DINOv3. LayerScale is a parameter of the block."""

    def __init__(self, attention=Attention):
        nn.Module.__init__(self)
        self.norm1, self.norm2 = LayerNorm(DIM), LayerNorm(DIM)
        self.attn, self.mlp = attention(), Mlp()
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((DIM,), 0.1)) for _ in range(2))

    def forward(self, x):
        x = x + self.gamma_1 * self.attn(self.norm1(x))
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class NestedTensorBlock(Block):
    """Meta's DINOv2."""


class SelfAttentionBlock(nn.Module):
    """Meta's DINOv3."""

    __init__, forward = Block.__init__, Block.forward


class BeitBlock(nn.Module):
    """timm's BEiT, where it is also named Block."""

    def __init__(self):
        EvaBlock.__init__(self, BiasedAttention)

    forward = EvaBlock.forward


BeitBlock.__name__ = "Block"


class SwinTransformerBlock(nn.Module):
    """timm's. The windows are left out: the attention gets one window."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn, self.mlp = Attention(), Mlp()

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SwinTransformerV2Block(nn.Module):
    """timm's: the norms follow the sub-layers."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn, self.mlp = CosineAttention(), Mlp()

    def forward(self, x):
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class PatchMerging(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4 * DIM)
        self.reduction = nn.Linear(4 * DIM, DIM, bias=False)

    def forward(self, x):
        return self.reduction(self.norm(x.unflatten(1, (-1, 4)).flatten(2)))


class MicrosoftSwinv2Block(SwinTransformerV2Block):
    pass


MicrosoftSwinv2Block.__name__ = "SwinTransformerBlock"


class WindowedAttention(nn.Module):
    """The two modules of transformers' older attention."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(DIM, DIM) for _ in range(3))

        def forward(self, x):
            return (attend(torch.cat([self.query(x), self.key(x), self.value(x)], dim=-1)),)

    class Output(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(DIM, DIM)

        def forward(self, x):
            return self.dense(x)

    def __init__(self):
        super().__init__()
        self.attention, self.output = self.Inner(), self.Output()

    def forward(self, x):
        return (self.output(self.attention(x)[0]),)


class WindowedMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.activation, self.fc2 = nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class Lambda(nn.Module):
    def __init__(self):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.full((DIM,), 0.1))

    def forward(self, x):
        return x * self.lambda1


class WindowedDinov2WithRegistersLayer(nn.Module):
    """`rfdetr`'s: half of the blocks attend inside windows only."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention, self.mlp = WindowedAttention(), WindowedMlp()
        self.layer_scale1, self.layer_scale2 = Lambda(), Lambda()

    def forward(self, x):
        x = x + self.layer_scale1(self.attention(self.norm1(x))[0])
        return (x + self.layer_scale2(self.mlp(self.norm2(x))),)


class Encoder(nn.Module):
    """Patches of an image, and blocks."""

    def __init__(self, *blocks):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, DIM, 8, 8)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.norm(x)


def _encoder(*makes):
    torch.manual_seed(0)
    return Encoder(*(make() for make in makes)).eval()


def vit():
    return _encoder(Block, Block)


def dinov2():
    return _encoder(lambda: NestedTensorBlock(LayerScale), lambda: NestedTensorBlock(LayerScale, SwiGLUFFN))


def dinov3():
    return _encoder(*[lambda: SelfAttentionBlock(LayerScale)] * 2)


def dinov3_without_layer_scale():
    return _encoder(SelfAttentionBlock, SelfAttentionBlock)


def eva():
    return _encoder(EvaBlock, EvaBlock)


def eva_with_biases():
    return _encoder(*[lambda: EvaBlock(BiasedAttention)] * 2)


def beit():
    return _encoder(BeitBlock, BeitBlock)


def swin():
    return _encoder(SwinTransformerBlock, PatchMerging, SwinTransformerBlock)


def swinv2():
    return _encoder(SwinTransformerV2Block, PatchMerging, SwinTransformerV2Block)


def microsoft_swinv2():
    return _encoder(MicrosoftSwinv2Block, MicrosoftSwinv2Block)


def windowed_dinov2():
    return _encoder(*[WindowedDinov2WithRegistersLayer] * 2)
