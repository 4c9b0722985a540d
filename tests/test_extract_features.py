"""appendix/tools/extract_features.py: rows belong to their files, and are what the model itself gives."""
import numpy as np
import pytest
import torch
from PIL import Image

from appendix.tools import extract_features
from common.augment import eval_transform
from common.checkpoint import save_torch
from common.errors import UserError
from common.images import ImageSet, UnreadableImage, read_image
from common.vit import build_vit
from tests.helpers import assert_close, settings_of


def test_each_row_is_its_file_s_features(tmp_path):
    torch.manual_seed(0)
    vit = build_vit("vit_demo", img_size=32, patch_size=8, num_classes=5, global_pool="token").eval()
    save_torch(tmp_path / "vit.pt", {"model": vit.state_dict(), "config": vit.config})
    for i, folder in enumerate(("b", "a/x", "a/y")):
        (tmp_path / "images" / folder).mkdir(parents=True)
        Image.new("RGB", (40, 30), (80 * i, 20, 255 - 60 * i)).save(tmp_path / "images" / folder / f"{i}.png")
    args = settings_of(extract_features, {
        "init": str(tmp_path / "vit.pt"), "data_path": str(tmp_path / "images"), "device": "cpu", "workers": 0,
        "save_to": str(tmp_path / "out" / "features.npz")})
    assert extract_features.main(args) == {"features": args.save_to, "images": 3, "dim": 96}
    with np.load(args.save_to) as found:
        features, files = found["features"], found["files"].tolist()
    assert files == ["a/x/1.png", "a/y/2.png", "b/0.png"]
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for row, file in zip(features, files):
        image = (eval_transform([32])(read_image(tmp_path / "images" / file)) - mean) / std
        with torch.no_grad():
            assert_close(row, vit.forward_head(vit.forward_features(image[None]), pre_logits=True)[0], 1e-5)


def test_images_without_files_have_numbers():
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    assert extract_features.names_of(ImageSet("cifar10", pixels, None, []), "a/folder") == ["0", "1", "2"]


def test_a_fine_tuned_model_gives_the_mean_behind_its_norm(tmp_path, capsys):
    """Its classifier reads fc_norm of the mean: the head on our features gives the model's logits."""
    torch.manual_seed(0)
    vit = build_vit("vit_demo", img_size=32, patch_size=8, num_classes=5).eval()
    torch.nn.init.normal_(vit.fc_norm.weight)
    save_torch(tmp_path / "ft.pt", {"model": vit.state_dict(), "config": vit.config})
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32), (90, 120, 30)).save(tmp_path / "images" / "0.png")
    given = {"init": str(tmp_path / "ft.pt"), "data_path": str(tmp_path / "images"), "device": "cpu", "workers": 0,
             "output": str(tmp_path / "out")}

    def extract(**more):
        args = settings_of(extract_features, {**given, **more})
        return np.load(extract_features.main(args)["features"])["features"]
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    image = (eval_transform([32])(read_image(tmp_path / "images" / "0.png")) - mean) / std
    with torch.no_grad():
        assert_close(vit.head(torch.from_numpy(extract(pooling="avg"))), vit(image[None]), 1e-5)
    capsys.readouterr()
    assert np.array_equal(extract(), extract(pooling="avg"))  # as documented: the classifier says its pooling
    assert "as the weights say:" in (said := capsys.readouterr().out) and "--pooling avg" in said
    with pytest.raises(UserError, match="fine-tuned on the mean .*leave --pooling token out"):
        extract(pooling="token")
    assert not np.array_equal(extract(layer=3), extract(layer=3, pooling="token"))
    assert len(list((tmp_path / "out" / "extract_features").iterdir())) == 3


def test_where_val_alone_is_read_a_line_says_so(tmp_path, capsys):
    vit = build_vit("vit_demo", img_size=32, patch_size=8, num_classes=5)
    save_torch(tmp_path / "ft.pt", {"model": vit.state_dict(), "config": vit.config})
    for place in ("train/a", "val/a"):
        (tmp_path / "images" / place).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "images" / place / "0.png")

    def said(folder):
        extract_features.main(settings_of(extract_features, {
            "init": str(tmp_path / "ft.pt"), "data_path": str(folder), "device": "cpu", "workers": 0,
            "output": str(tmp_path / "out")}))
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("these are")]
    images = tmp_path / "images"
    assert said(images) == [f"these are of {images}/val alone; --data-path {images}/train reads the others"]
    assert said(images / "train") == []
    (images / "test").mkdir()
    assert extract_features.read_alone(images).endswith(f"--data-path {images}/test or {images}/train reads the others")


@pytest.mark.parametrize(("workers", "micro_batch"), [(0, 2), (0, 512), (1, 3)])
def test_unreadable_images_are_passed_over_and_the_other_rows_stay_with_their_files(tmp_path, workers, micro_batch):
    """Text, an empty file, half a file; first, in the middle and last, so that a shift of the rows would show."""
    vit = build_vit("vit_demo", img_size=32, patch_size=8, num_classes=5)
    save_torch(tmp_path / "vit.pt", {"model": vit.state_dict(), "config": vit.config})
    place = tmp_path / "images"
    place.mkdir()
    for number in range(6):
        Image.new("RGB", (40, 40), (40 * number, 9, 200)).save(place / f"{number}.png")
    given = {"init": str(tmp_path / "vit.pt"), "data_path": str(place), "device": "cpu", "workers": workers,
             "micro_batch": micro_batch, "output": str(tmp_path / "out")}

    def extract(**more):
        result = extract_features.main(settings_of(extract_features, {**given, **more}))
        with np.load(result["features"]) as found:
            return result, dict(found)
    _, whole = extract()
    (place / "0.png").write_bytes(b"text")
    (place / "3.png").write_bytes(b"")
    (place / "5.png").write_bytes((place / "4.png").read_bytes()[:60])
    with pytest.raises((UnreadableImage, RuntimeError), match="0.png.*--on-bad-image skip"):
        extract(on_bad_image="stop")
    result, found = extract()
    assert found["files"].tolist() == ["1.png", "2.png", "4.png"] and result["images"] == 3
    assert found["unreadable"].tolist() == result["unreadable"] == ["0.png", "3.png", "5.png"]
    assert_close(torch.from_numpy(found["features"]), torch.from_numpy(whole["features"][[1, 2, 4]]), 1e-5)
    for number in range(6):
        (place / f"{number}.png").write_bytes(b"text")
    with pytest.raises(UserError, match="none of 6 images could be read"):
        extract()
