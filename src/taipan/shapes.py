"""The legend of dimension letters, and the shape types made of them.

====== ==========================================  ====== ======================================
letter meaning                                     letter meaning
====== ==========================================  ====== ======================================
B      batch (rows)                                S      selected tokens, padded over the batch
T      tokens of a row in this call                W      slots of an attention window
D      hidden size                                 E      head dim of attention
V      vocabulary                                  Q      queries of an attention call
H      heads                                       J      keys of an attention call
P      head dim of Mamba-2                         C      channels of the causal convolution
N      state size of Mamba-2                       K      taps of the causal convolution
L      inputs a convolution remembers, K − 1       U      keys used by one block of queries
R      last tokens that a gate remembers           O      lengths of n-grams that recall looks for
G      groups sharing B and C (or key/value heads) M      tokens of a batch in one row
Y      Selective Attention Layers
====== ==========================================  ====== ======================================

The types are checked live in the tests only (jaxtyping's import hook); at run time they cost nothing.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

BoolB = Bool[Tensor, "B"]
BoolBS = Bool[Tensor, "B S"]
BoolT = Bool[Tensor, "T"]
BoolYT = Bool[Tensor, "Y T"]
BoolBT = Bool[Tensor, "B T"]
BoolBV = Bool[Tensor, "B V"]
BoolBJ = Bool[Tensor, "B J"]
BoolBQJ = Bool[Tensor, "B Q J"]
FloatB = Float[Tensor, "B"]
Float0 = Float[Tensor, ""]
FloatT = Float[Tensor, "T"]
FloatYT = Float[Tensor, "Y T"]
FloatT2 = Float[Tensor, "T 2"]
FloatBT = Float[Tensor, "B T"]
FloatBR = Float[Tensor, "B R"]
FloatBS = Float[Tensor, "B S"]
FloatBV = Float[Tensor, "B V"]
FloatBT2 = Float[Tensor, "B T 2"]
FloatBTD = Float[Tensor, "B T D"]
FloatBSD = Float[Tensor, "B S D"]
FloatBTV = Float[Tensor, "B T V"]
FloatBTC = Float[Tensor, "B T C"]
FloatCK = Float[Tensor, "C K"]
FloatC = Float[Tensor, "C"]
FloatD = Float[Tensor, "D"]
FloatXD = Float[Tensor, "... D"]
FloatBLC = Float[Tensor, "B L C"]
FloatBLD = Float[Tensor, "B L D"]
FloatBTH = Float[Tensor, "B T H"]
FloatBTHP = Float[Tensor, "B T H P"]
FloatBTGN = Float[Tensor, "B T G N"]
FloatBTHN = Float[Tensor, "B T H N"]
FloatBHPN = Float[Tensor, "B H P N"]
FloatH = Float[Tensor, "H"]
FloatM = Float[Tensor, "M"]
FloatMD = Float[Tensor, "M D"]
FloatVD = Float[Tensor, "V D"]
FloatBTHE = Float[Tensor, "B T H E"]
FloatBTGE = Float[Tensor, "B T G E"]
FloatBQHE = Float[Tensor, "B Q H E"]
FloatBJGE = Float[Tensor, "B J G E"]
FloatBSGE = Float[Tensor, "B S G E"]
FloatBWGE = Float[Tensor, "B W G E"]
FloatBW = Float[Tensor, "B W"]
IntB = Int[Tensor, "B"]
IntBQ = Int[Tensor, "B Q"]
IntBJ = Int[Tensor, "B J"]
IntBU = Int[Tensor, "B U"]
IntM = Int[Tensor, "M"]
IntBS = Int[Tensor, "B S"]
IntBT = Int[Tensor, "B T"]
IntBW = Int[Tensor, "B W"]
IntBR = Int[Tensor, "B R"]
IntBTO = Int[Tensor, "B T O"]
IntT = Int[Tensor, "T"]
