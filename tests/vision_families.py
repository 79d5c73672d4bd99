"""Tiny random vision-language models of Hugging Face, each with an image and, where the family takes it, a video."""

from typing import Any

import torch
from vision_inputs import IMAGE, START, VIDEO, Asked, Family, frames, molmo2, noise, patches, pixels

TEXT = dict(
    vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, max_position_embeddings=512, initializer_range=0.08,
    bos_token_id=None, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
TOWER = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14,
    initializer_range=0.2,
)  # fmt: skip
QWEN_TOWER = dict(
    depth=2, num_heads=2, hidden_size=32, embed_dim=32, intermediate_size=48, patch_size=14, spatial_merge_size=2,
    temporal_patch_size=2, out_hidden_size=64, initializer_range=0.2,
)  # fmt: skip
SECTIONS = dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 6, 6])


def text(model_type: str, **options: Any) -> dict[str, Any]:
    return TEXT | dict(model_type=model_type) | options


def tower(model_type: str | None = None, **options: Any) -> dict[str, Any]:
    return TOWER | ({} if model_type is None else dict(model_type=model_type)) | options


QWEN = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=253)
QWEN2_TEXT = text("qwen2_vl_text", rope_parameters=SECTIONS)
SMALL_ROPE = dict(rope_type="default", rope_theta=1e4)
SIGLIP = tower("siglip_vision_model", vision_use_head=False)
PIXTRAL = tower("pixtral", head_dim=16)

FAMILIES = {
    "smolvlm": Family(
        dict(model_type="smolvlm", text_config=text("llama"), vision_config=TOWER, image_token_id=IMAGE,
        scale_factor=2),
        lambda: Asked(4, dict(pixel_values=noise(1, 1, 3, 56, 56))),
        lambda: Asked(12, dict(pixel_values=noise(1, 3, 3, 56, 56))),
    ),
    "idefics2": Family(
        dict(
            model_type="idefics2", text_config=text("mistral", sliding_window=None), vision_config=TOWER,
            image_token_id=IMAGE, perceiver_config=dict(
                hidden_size=64, resampler_n_latents=4, resampler_depth=1, resampler_n_heads=2, resampler_head_dim=16,
                num_key_value_heads=1, initializer_range=0.2,
            ),
        ),
        lambda: Asked(4, dict(pixel_values=noise(1, 1, 3, 56, 56))),
    ),
    "idefics3": Family(
        dict(model_type="idefics3", text_config=text("llama"), vision_config=TOWER, image_token_id=IMAGE,
        scale_factor=2),
        lambda: Asked(4, dict(pixel_values=noise(1, 1, 3, 56, 56))),
    ),
    "llava": Family(
        dict(model_type="llava", text_config=text("llama"), vision_config=tower("clip_vision_model"),
        image_token_index=IMAGE),
        pixels(16),
    ),
    "llava_next": Family(
        dict(
            model_type="llava_next", text_config=text("llama"), vision_config=tower("clip_vision_model"),
            image_token_index=IMAGE, image_grid_pinpoints=[[56, 112], [112, 56]],
        ),
        lambda: Asked(52, dict(pixel_values=noise(1, 3, 3, 56, 56), image_sizes=torch.tensor([[56, 112]]))),
    ),
    "llava_next_video": Family(
        dict(
            model_type="llava_next_video", text_config=text("llama"), vision_config=tower("clip_vision_model"),
            image_token_index=IMAGE, video_token_index=VIDEO, image_grid_pinpoints=[[56, 112], [112, 56]],
        ),
        lambda: Asked(52, dict(pixel_values=noise(1, 3, 3, 56, 56), image_sizes=torch.tensor([[56, 112]]))),
        frames(12),
    ),
    "llava_onevision": Family(
        dict(
            model_type="llava_onevision", text_config=text("qwen2"), vision_config=SIGLIP, image_token_index=IMAGE,
            video_token_index=VIDEO, image_grid_pinpoints=[[56, 56]],
        ),
        lambda: Asked(36, dict(pixel_values=noise(1, 2, 3, 56, 56), image_sizes=torch.tensor([[56, 56]]))),
        frames(13),
    ),
    "vipllava": Family(
        dict(
            model_type="vipllava", text_config=text("llama"), vision_config=tower("clip_vision_model"),
            image_token_index=IMAGE, vision_feature_layer=[-2, -1],
        ),
        pixels(16),
    ),
    "video_llava": Family(
        dict(
            model_type="video_llava", text_config=text("llama"), vision_config=tower("clip_vision_model"),
            image_token_index=IMAGE, video_token_index=VIDEO,
        ),
        lambda: Asked(16, dict(pixel_values_images=noise(1, 3, 56, 56))),
        frames(8 * 17, 8),
    ),
    "internvl": Family(
        dict(
            model_type="internvl", text_config=text("qwen2"), image_token_id=IMAGE,
            vision_config=TOWER | dict(image_size=[56, 56], patch_size=[14, 14]),
        ),
        pixels(4),
        lambda: Asked(12, dict(pixel_values=noise(3, 3, 56, 56))),
    ),
    "qianfan_ocr": Family(
        dict(
            model_type="qianfan_ocr", text_config=text("qwen3"), image_token_id=IMAGE,
            vision_config=TOWER | dict(image_size=[56, 56], patch_size=[14, 14], drop_path_rate=0.0),
        ),
        pixels(4),
    ),
    "qwen2_vl": Family(
        dict(model_type="qwen2_vl", text_config=QWEN2_TEXT, vision_config=QWEN_TOWER | dict(hidden_size=64,
        mlp_ratio=2), **QWEN),
        patches("image", 1), patches("video", 2), START, (1, 2),
    ),
    "qwen2_5_vl": Family(
        dict(
            model_type="qwen2_5_vl", text_config=QWEN2_TEXT | dict(model_type="qwen2_5_vl_text"),
            vision_config=QWEN_TOWER | dict(fullatt_block_indexes=[1], window_size=56), **QWEN,
        ),
        patches("image", 1), patches("video", 2), START, (1, 2),
    ),
    "qwen3_vl": Family(
        dict(
            model_type="qwen3_vl", text_config=text("qwen3_vl_text", rope_parameters=SECTIONS),
            vision_config=QWEN_TOWER | dict(num_position_embeddings=16, deepstack_visual_indexes=[0, 1]), **QWEN,
        ),
        patches("image", 1), patches("video", 1), START, (1, 2),
    ),
    "qwen3_5": Family(
        dict(
            model_type="qwen3_5", vision_config=QWEN_TOWER | dict(num_position_embeddings=16), **QWEN,
            text_config=text(
                "qwen3_5_text", rope_parameters=SECTIONS | dict(partial_rotary_factor=1.0), linear_key_head_dim=16,
                linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2,
                layer_types=["linear_attention", "full_attention"],
            ),
        ),
        patches("image", 1), patches("video", 1), START, (1, 2),
    ),
    "exaone4_5": Family(
        dict(
            model_type="exaone4_5", image_token_id=IMAGE, video_token_id=VIDEO,
            text_config=text("exaone4", sliding_window=None, layer_types=["full_attention"] * 2),
            vision_config=QWEN_TOWER | dict(fullatt_block_indexes=[1], window_size=56, num_key_value_heads=1),
        ),
        patches("image", 1), patches("video", 2),
    ),
    "glm4v": Family(
        dict(
            model_type="glm4v", text_config=text("glm4v_text",
            rope_parameters=SECTIONS | dict(partial_rotary_factor=1.0)),
            vision_config=QWEN_TOWER | dict(image_size=56), image_token_id=IMAGE, video_token_id=VIDEO,
            image_start_token_id=START, image_end_token_id=253, video_start_token_id=254, video_end_token_id=255,
        ),
        patches("image", 1), None, START, (1, 2),
    ),
    "video_llama_3": Family(
        dict(
            model_type="video_llama_3", text_config=text("qwen2"), vision_config=TOWER, image_token_id=IMAGE,
            video_token_id=VIDEO,
        ),
        lambda: Asked(4, patches("image", 1, size=588)().given | dict(image_merge_sizes=torch.tensor([2]))),
        lambda: Asked(
            8, patches("video", 2, size=588)().given
            | dict(video_merge_sizes=torch.tensor([2]), video_compression_mask=torch.ones(8, dtype=torch.bool)),
        ),
    ),
    "molmo2": Family(
        dict(
            model_type="molmo2", image_patch_id=IMAGE, image_start_token_id=START, low_res_image_start_token_id=253,
            image_end_token_id=254, frame_start_token_id=255, frame_end_token_id=249,
            text_config=TEXT | dict(vocab_size=240, additional_vocab_size=16, rope_parameters=SMALL_ROPE),
            vision_config=TOWER | dict(
                num_key_value_heads=2, head_dim=16, image_size=[56, 56], num_position_embeddings=16
            ),
            adapter_config=dict(
                hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
                text_hidden_size=64, vision_feature_layer=[0, 1], initializer_range=0.2,
            ),
        ),
        molmo2("image", 1), molmo2("video", 3), None, (1, 1),
    ),
    "gemma3": Family(
        dict(
            model_type="gemma3", image_token_index=IMAGE, mm_tokens_per_image=4, boi_token_index=START,
            eoi_token_index=253,
            text_config=text(
                "gemma3_text", layer_types=["sliding_attention", "full_attention"], sliding_window=16,
                query_pre_attn_scalar=32,
            ),
            vision_config=SIGLIP,
        ),
        pixels(4), None, START, (1, 1), "token_type_ids",
    ),
    "paligemma": Family(
        dict(
            model_type="paligemma", image_token_index=IMAGE, projection_dim=64, hidden_size=64,
            text_config=text("gemma"),
            vision_config=SIGLIP | dict(projection_dim=64),
        ),
        pixels(16),
    ),
    "mistral3": Family(
        dict(
            model_type="mistral3", image_token_index=IMAGE, text_config=text("mistral", sliding_window=None),
            vision_config=PIXTRAL,
        ),
        pixels(4, image_sizes=torch.tensor([[56, 56]])),
    ),
    "lighton_ocr": Family(
        dict(model_type="lighton_ocr", image_token_id=IMAGE, text_config=text("qwen3"), vision_config=PIXTRAL),
        pixels(4, image_sizes=torch.tensor([[56, 56]])),
    ),
    "aya_vision": Family(
        dict(
            model_type="aya_vision", image_token_index=IMAGE, vision_config=SIGLIP,
            text_config=text("cohere2", layer_types=["sliding_attention", "full_attention"], sliding_window=16),
        ),
        pixels(4),
    ),
    "cohere2_vision": Family(
        dict(
            model_type="cohere2_vision", image_token_id=IMAGE, vision_config=SIGLIP, alignment_intermediate_size=64,
            text_config=text("cohere2", layer_types=["sliding_attention", "full_attention"], sliding_window=16),
        ),
        pixels(4),
    ),
    "got_ocr2": Family(
        dict(
            model_type="got_ocr2", image_token_index=IMAGE, image_seq_length=4, text_config=text("qwen2"),
            vision_config=TOWER | dict(
                image_size=128, patch_size=16, output_channels=16, global_attn_indexes=[1], window_size=4, mlp_dim=48
            ),
        ),
        lambda: Asked(4, dict(pixel_values=noise(1, 3, 128, 128))),
    ),
    "mllama": Family(
        dict(
            model_type="mllama", image_token_index=IMAGE,
            text_config=TEXT | dict(
                num_hidden_layers=3, cross_attention_layers=[1], rope_parameters=SMALL_ROPE,
                bos_token_id=1, eos_token_id=2,
            ),
            vision_config=dict(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_global_layers=1, attention_heads=2,
                image_size=56, patch_size=14, max_num_tiles=1, intermediate_layers_indices=[0, 1], vision_output_dim=96,
                supported_aspect_ratios=[[1, 1]], initializer_range=0.2,
            ),
        ),
        lambda: Asked(
            1, dict(
                pixel_values=noise(1, 1, 1, 3, 56, 56), aspect_ratio_ids=torch.ones(1, 1, dtype=torch.long),
                aspect_ratio_mask=torch.ones(1, 1, 1, dtype=torch.long), cross_attention_mask=None,
            ),
        ),
    ),
    "lfm2_vl": Family(
        dict(
            model_type="lfm2_vl", image_token_id=IMAGE, projector_hidden_size=48,
            text_config=text("lfm2", layer_types=["conv", "full_attention"], block_ff_dim=96),
            vision_config=tower("siglip2_vision_model", num_patches=16, vision_use_head=False),
        ),
        lambda: Asked(
            4, dict(
                pixel_values=noise(1, 16, 588), spatial_shapes=torch.tensor([[4, 4]]),
                pixel_attention_mask=torch.ones(1, 16, dtype=torch.long),
            ),
        ),
    ),
    "ovis2": Family(
        dict(
            model_type="ovis2", image_token_id=IMAGE, visual_indicator_token_ids=[241, 242, 243, 244, 245],
            vocab_size=256,
            hidden_size=64, text_config=text("qwen2"), vision_config=TOWER | dict(vocab_size=32, hidden_stride=2),
        ),
        pixels(4),
    ),
    "deepseek_vl": Family(
        dict(model_type="deepseek_vl", image_token_id=IMAGE, text_config=text("llama"), vision_config=SIGLIP),
        pixels(16),
    ),
    "janus": Family(
        dict(
            model_type="janus", image_token_id=IMAGE, text_config=text("llama"),
            vision_config=TOWER | dict(projection_dim=64, mlp_ratio=2, num_image_tokens=16, depth=1),
            vq_config=dict(
                embed_dim=4, num_embeddings=8, latent_channels=8, base_channels=32, channel_multiplier=[1],
                num_res_blocks=1, num_patches=4, projection_dim=64, image_token_embed_dim=64,
            ),
        ),
        pixels(16),
    ),
    "aria": Family(
        dict(
            model_type="aria", image_token_index=IMAGE, vision_config=tower("idefics3_vision"),
            projector_patch_to_query_dict={16: 4},
            text_config=text("aria_text", moe_num_experts=2, moe_topk=1, moe_num_shared_experts=1),
        ),
        lambda: Asked(4, dict(pixel_values=noise(1, 3, 56, 56), pixel_mask=torch.ones(1, 56, 56, dtype=torch.bool))),
    ),
    "fuyu": Family(
        dict(
            model_type="fuyu", image_token_id=IMAGE, image_size=56, patch_size=14,
            text_config=text("persimmon", num_key_value_heads=2, hidden_size=64), vocab_size=256, hidden_size=64,
        ),
        lambda: Asked(16, dict(image_patches=noise(1, 16, 588))),
    ),
    "instructblip": Family(
        dict(
            model_type="instructblip", image_token_index=IMAGE, num_query_tokens=4, vision_config=TOWER,
            qformer_config=dict(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                encoder_hidden_size=32,
                vocab_size=256,
            ),
            text_config=text("llama"),
        ),
        lambda: Asked(
            4, dict(pixel_values=noise(1, 3, 56, 56), qformer_input_ids=torch.tensor([[5, 6, 7]]))
        ),
    ),
    "blip-2": Family(
        dict(
            model_type="blip-2", image_token_index=IMAGE, num_query_tokens=4, vision_config=TOWER,
            qformer_config=dict(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, encoder_hidden_size=32
            ),
            text_config=text("llama"),
        ),
        pixels(4),
    ),
    "paddleocr_vl": Family(
        dict(
            model_type="paddleocr_vl", vision_config=TOWER | dict(spatial_merge_size=2), **QWEN,
            text_config=text("paddleocr_vl_text", rope_parameters=SECTIONS),
        ),
        lambda: Asked(
            4, dict(pixel_values=noise(1, 16, 3, 14, 14)[0], image_grid_thw=torch.tensor([[1, 4, 4]])),
        ),
        None, START, (1, 2),
    ),
    "hunyuan_vl": Family(
        dict(
            model_type="hunyuan_vl", image_token_id=IMAGE, im_start_id=START, im_end_id=253, im_newline_id=254,
            text_config=text("hunyuan_vl_text", rope_parameters=SMALL_ROPE | dict(mrope_section=[4, 4, 4, 4])),
            vision_config=TOWER | dict(out_hidden_size=64, text_hidden_size=64, max_image_size=56, min_image_size=28),
        ),
        lambda: Asked(8, patches("image", 1, size=588)().given),  # with tokens for its ends and rows
    ),
}  # fmt: skip
