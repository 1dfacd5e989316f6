"""Figures that the paper publishes (Tables 1-3): for a table of their own, never for a comparison with ours (S32, S34, S37)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One table of the paper: columns are ``<task>/<metric>``; ``thinks`` marks the methods with a reasoning step."""

    title: str
    columns: tuple[str, ...]
    methods: dict[str, tuple[float, ...]]
    thinks: frozenset[str] = frozenset()


LAMP = Published(
    title="Table 1: LaMP, all validation rows of the time-based split, Qwen3-8B, 8 profile items",
    columns=(
        "lamp1/accuracy",
        "lamp1/f1",
        "lamp2/accuracy",
        "lamp2/f1_macro",
        "lamp3/mae",
        "lamp3/rmse",
        "lamp4/rouge1",
        "lamp4/rougeL",
        "lamp5/rouge1",
        "lamp5/rougeL",
        "lamp7/rouge1",
        "lamp7/rougeL",
    ),
    methods={
        "Zero-shot": (0.498, 0.470, 0.318, 0.244, 0.639, 0.983, 0.144, 0.125, 0.417, 0.351, 0.465, 0.413),
        "Zero-shot-R": (0.477, 0.483, 0.389, 0.347, 0.416, 0.778, 0.131, 0.115, 0.354, 0.306, 0.431, 0.383),
        "RAG": (0.668, 0.645, 0.414, 0.361, 0.354, 0.710, 0.158, 0.139, 0.453, 0.384, 0.473, 0.419),
        "RAG-R (Base)": (0.717, 0.722, 0.453, 0.413, 0.291, 0.645, 0.152, 0.137, 0.434, 0.365, 0.439, 0.391),
        "PAG": (0.677, 0.649, 0.420, 0.367, 0.337, 0.675, 0.167, 0.148, 0.452, 0.385, 0.479, 0.426),
        "PAG-R": (0.731, 0.736, 0.470, 0.417, 0.289, 0.627, 0.160, 0.142, 0.408, 0.349, 0.428, 0.380),
        "SFT": (0.670, 0.654, 0.511, 0.461, 0.273, 0.569, 0.196, 0.178, 0.455, 0.393, 0.498, 0.445),
        "SFT-R": (0.722, 0.724, 0.456, 0.416, 0.339, 0.878, 0.159, 0.145, 0.440, 0.378, 0.437, 0.386),
        "SFT-Ind": (0.717, 0.717, 0.532, 0.488, 0.269, 0.568, 0.207, 0.187, 0.463, 0.411, 0.507, 0.454),
        "SFT-Ind-R": (0.729, 0.731, 0.463, 0.419, 0.366, 1.001, 0.151, 0.138, 0.432, 0.374, 0.433, 0.383),
        "PPlug": (0.698, 0.699, 0.535, 0.489, 0.261, 0.532, 0.213, 0.195, 0.486, 0.434, 0.521, 0.465),
        "HYDRA-Adapter": (0.692, 0.692, 0.482, 0.455, 0.320, 0.663, 0.159, 0.138, 0.457, 0.395, 0.483, 0.423),
        "R2P": (0.729, 0.730, 0.487, 0.459, 0.267, 0.557, 0.176, 0.155, 0.459, 0.396, 0.489, 0.426),
        "PrLM": (0.731, 0.731, 0.534, 0.504, 0.288, 0.635, 0.183, 0.169, 0.499, 0.438, 0.513, 0.459),
        "GPT-4o": (0.733, 0.733, 0.542, 0.512, 0.254, 0.554, 0.191, 0.175, 0.470, 0.407, 0.475, 0.419),
        "Qwen3-235B-A22B": (0.715, 0.720, 0.511, 0.488, 0.280, 0.633, 0.177, 0.158, 0.450, 0.396, 0.455, 0.409),
        "DeepSeek-R1": (0.740, 0.744, 0.522, 0.488, 0.280, 0.644, 0.181, 0.166, 0.451, 0.399, 0.447, 0.397),
        "Gemini-2.5-Pro": (0.761, 0.761, 0.582, 0.548, 0.271, 0.594, 0.222, 0.202, 0.495, 0.438, 0.480, 0.425),
        "TagPR w/o RL": (0.722, 0.724, 0.456, 0.416, 0.339, 0.878, 0.159, 0.145, 0.440, 0.378, 0.437, 0.386),
        "TagPR w/o SFT": (0.747, 0.747, 0.543, 0.510, 0.271, 0.593, 0.194, 0.181, 0.502, 0.441, 0.525, 0.469),
        "TagPR w/o Tag": (0.749, 0.749, 0.545, 0.511, 0.272, 0.595, 0.197, 0.183, 0.506, 0.441, 0.524, 0.469),
        "TagPR w/o Reward": (0.768, 0.769, 0.557, 0.514, 0.246, 0.393, 0.205, 0.190, 0.522, 0.453, 0.545, 0.490),
        "TagPR": (0.803, 0.803, 0.598, 0.557, 0.218, 0.263, 0.234, 0.213, 0.542, 0.471, 0.565, 0.507),
    },
    thinks=frozenset(
        {
            "Zero-shot-R", "RAG-R (Base)", "PAG-R", "SFT-R", "SFT-Ind-R", "R2P", "PrLM", "Qwen3-235B-A22B", "DeepSeek-R1",
            "Gemini-2.5-Pro", "TagPR w/o RL", "TagPR w/o SFT", "TagPR w/o Tag", "TagPR w/o Reward", "TagPR",
        }
    ),
)  # fmt: skip

DIANPING = Published(
    title="Table 2: Dianping, trained on LaMP only; its ROUGE on Chinese text is not defined there",
    columns=(
        "dianping_content/rouge1",
        "dianping_content/rougeL",
        "dianping_title/rouge1",
        "dianping_title/rougeL",
        "dianping_paraph/rouge1",
        "dianping_paraph/rougeL",
    ),
    methods={
        "RAG": (0.200, 0.151, 0.209, 0.184, 0.598, 0.568),
        "RAG-R (Base)": (0.183, 0.144, 0.197, 0.173, 0.517, 0.461),
        "SFT": (0.189, 0.123, 0.228, 0.210, 0.603, 0.571),
        "SFT-R": (0.187, 0.145, 0.198, 0.177, 0.498, 0.423),
        "GPT-4o": (0.207, 0.168, 0.236, 0.211, 0.606, 0.573),
        "Gemini-2.5-Pro": (0.217, 0.170, 0.215, 0.195, 0.564, 0.475),
        "TagPR": (0.216, 0.171, 0.240, 0.218, 0.617, 0.583),
    },
    thinks=frozenset({"RAG-R (Base)", "SFT-R", "Gemini-2.5-Pro", "TagPR"}),
)

LONG = Published(
    title="Table 3: parts of LongLaMP's and PGraphRAG's test sets, trained on LaMP only",
    columns=(
        "longlamp_topic/rouge1",
        "longlamp_topic/rougeL",
        "longlamp_review/rouge1",
        "longlamp_review/rougeL",
        "longlamp_abstract/rouge1",
        "longlamp_abstract/rougeL",
        "pgraphrag_title/rouge1",
        "pgraphrag_title/rougeL",
    ),
    methods={
        "Qwen3-8B, no thinking": (0.282, 0.134, 0.342, 0.154, 0.382, 0.203, 0.172, 0.163),
        "Qwen3-8B, thinking (Base)": (0.271, 0.124, 0.321, 0.150, 0.351, 0.182, 0.179, 0.165),
        "Qwen3-32B, no thinking": (0.292, 0.134, 0.354, 0.159, 0.384, 0.202, 0.171, 0.161),
        "Qwen3-32B, thinking": (0.275, 0.119, 0.320, 0.144, 0.346, 0.177, 0.198, 0.191),
        "GPT-4o": (0.294, 0.140, 0.330, 0.157, 0.372, 0.200, 0.140, 0.136),
        "Gemini-2.5-Pro": (0.270, 0.132, 0.372, 0.171, 0.398, 0.215, 0.204, 0.196),
        "TagPR": (0.303, 0.154, 0.377, 0.175, 0.404, 0.221, 0.210, 0.202),
    },
    thinks=frozenset({"Qwen3-8B, thinking (Base)", "Qwen3-32B, thinking", "Gemini-2.5-Pro", "TagPR"}),
)

TABLES = (LAMP, DIANPING, LONG)
