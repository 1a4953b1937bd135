set -e
# What 25e9a38 wrote, for tests/test_old_files.py. In a worktree of it: OLD=its folder, FFMPEG=a binary.
export PYTHONPATH=$OLD OMP_NUM_THREADS=1
seco() { python -m cli "$@"; }
mkdir -p raw/ucfTrainTestlist
lists=raw/ucfTrainTestlist
printf '1 Left\n2 Right\n' > $lists/classInd.txt
rm -f $lists/t*list01.txt
number=0
for class in Left Right; do
  number=$((number + 1))
  mkdir -p raw/$class
  for group in 01 02 03 04; do
    turn=$([ $class = Left ] && echo 0.1 || echo -0.1)*$group
    $FFMPEG -v error -f lavfi -i "testsrc2=size=48x36:rate=25,hue=h=50*$group,rotate=$turn" \
      -frames:v 8 -threads 1 -c:v mpeg4 -qscale:v 4 -y raw/$class/v_${class}_g${group}_c01.avi
    case $group in
      01 | 02) echo "$class/v_${class}_g${group}_c01.avi" >> $lists/testlist01.txt ;;
      *) echo "$class/v_${class}_g${group}_c01.avi $number" >> $lists/trainlist01.txt ;;
    esac
  done
done
seco prepare ucf101 --src raw --out shards --short-edge 36 --videos-per-shard 4 --name old \
  --frames 8 --workers 1
seco pretrain --shards shards/old.json --arch resnet18 --epochs 2 --batch-size 4 --bn-group 2 \
  --queue-size 8 --embedding-dim 8 --crop-size 32 --device cpu --workers 0 --out runs/old
python - <<'P'
# 140 MB of weights do not belong into a repository: every tensor is filled with its own first 61
# values over and over, which xz packs into some kB. Layout, names, shapes and types stay.
import torch
def repeat(value):
    if isinstance(value, torch.Tensor) and value.numel() > 61:
        flat = value.flatten()[:61]
        return flat.repeat(-(-value.numel() // 61))[: value.numel()].reshape(value.shape)
    if isinstance(value, dict):
        return type(value)((k, repeat(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(map(repeat, value))
    return value
torch.save(repeat(torch.load("runs/old/last.pt", weights_only=True)), "runs/old/last.pt")
P
seco extract-features --shards shards/old.json --checkpoint runs/old/last.pt --out features \
  --frames 4 --short-edge 36 --crop-size 32 --device cpu --workers 0
seco probe --features features --out probe
xz -9e -k -f runs/old/last.pt
