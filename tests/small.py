"""A config that several tests share: a small network, frames of a small flow for training, validation and test, one short training."""

_SMALL = """device = "cpu"
[model]
model_type = "ViT"
img_size = 16
patch_size = 4
embed_dim = 16
depth = 1
num_heads = 2
[train_dataset]
data_dir = "{data}"
trajectories = {trajectories}
frame_range = [[1, {cut}]]
[validation_dataset]
data_dir = "{data}"
trajectories = {trajectories}
frame_range = [[{cut}, {end}]]
[test_dataset]
data_dir = "{data}"
trajectories = [{test}]
frame_range = [[1, {end}]]
[training]
epochs = 1
{training}
rollout_steps = 4
rollout_starts = 2
"""


def small_config(
    trajectories: list[int],  # trained on; the one after them is the test's
    cut: int,  # the frame from which on they validate
    end: int,  # the frame after the last
    data: str = "flow",  # folder of the data
    training: str = "batch_size = 16",  # lines of [training]
) -> str:
    "Sections of a config, to which others can be added."
    return _SMALL.format(data=data, trajectories=trajectories, cut=cut, end=end, test=trajectories[-1] + 1, training=training)
