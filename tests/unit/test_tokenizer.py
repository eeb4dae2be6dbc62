# ruff: noqa: RUF001  # scripts are what is tested
"""Tokens to text: always the full decode so far, whole characters, no half stop string."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.frontdoor.model import ModelInfo
from cluster.frontdoor.tokenizer import Detokenizer, StopMatcher, TextStream, Tokenizer
from tests.unit.harness_published import DEMO, published_directory
from workers.errors import CheckpointError
from workers.types import Sampling

SCRIPTS = {
    "Latin": "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich — naïve façade.",
    "Greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "Cyrillic": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Armenian": "Բել դղյակի ձախ ժամն օֆ ազգությանը ցպահանջ չճշտած վնաս էր։",
    "Georgian": "სადაც არ ყოფილა ომი, იქ მშვიდობაა.",
    "Hebrew": "דג סקרן שט בים מאוכזב ולפתע מצא חברה.",
    "Arabic": "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر.",
    "Devanagari": "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश।",
    "Bengali": "আমি বাংলায় গান গাই, আমি বাংলার গান গাই।",
    "Gurmukhi": "ਸਤਿ ਸ੍ਰੀ ਅਕਾਲ, ਤੁਸੀਂ ਕਿਵੇਂ ਹੋ?",
    "Gujarati": "નમસ્તે, તમે કેમ છો? મજામાં.",
    "Tamil": "யாமறிந்த மொழிகளிலே தமிழ்மொழி போல் இனிதாவது எங்கும் காணோம்.",
    "Telugu": "దేశ భాషలందు తెలుగు లెస్స.",
    "Kannada": "ಸಿರಿಗನ್ನಡಂ ಗೆಲ್ಗೆ, ಸಿರಿಗನ್ನಡಂ ಬಾಳ್ಗೆ.",
    "Malayalam": "മലയാളം എന്റെ മാതൃഭാഷയാണ്.",
    "Sinhala": "ආයුබෝවන්, ඔබට කොහොමද?",
    "Thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน",
    "Tibetan": "བཀྲ་ཤིས་བདེ་ལེགས། ཁྱེད་རང་སྐུ་གཟུགས་བདེ་པོ་ཡིན་པས།",
    "Burmese": "သီဟိုဠ်မှ ဉာဏ်ကြီးရှင်သည် အာယုဝဍ္ဎနဆေးညွှန်းစာကို",
    "Khmer": "ខ្ញុំចង់រៀនភាសាខ្មែរ។",
    "Ethiopic": "ሰማይ አይታረስ ንጉሥ አይከሰስ።",
    "Han": "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。俱乐部、𠮷野家",
    "Japanese": "いろはにほへと ちりぬるを、ワガヨタレソ 常ならむ。",
    "Hangul": "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
    "Emoji": "👩‍👩‍👧‍👦 🏴󠁧󠁢󠁳󠁣󠁴󠁿 👍🏽 🇫🇷🇯🇵 ❤️‍🔥 1️⃣ 🫠",
    "Mixed": "```python\nprint('𝔘𝔫𝔦𝔠𝔬𝔡𝔢', “quotes”)\t\r\n```\n\n  — ½ ≠ ∞ \u200b\u0301e\u0301",
}


@pytest.fixture(scope="module")
def demo():
    return Tokenizer.load(DEMO / "tokenizer.json")


@pytest.fixture(scope="module")
def published_model(tmp_path_factory):
    return ModelInfo.load(published_directory(tmp_path_factory), name="qwen")


@pytest.fixture(scope="module")
def published(published_model):
    return published_model.tokenizer


@pytest.fixture(params=["demo", "published"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def pieces_of(tokenizer, token_ids):
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(token_id) for token_id in token_ids]


@pytest.mark.parametrize("script", SCRIPTS)
def test_incremental_text_is_the_full_decode(tokenizer, script):
    text = SCRIPTS[script]
    token_ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids)
    assert "".join(pieces) == text or "".join(pieces) == unicodedata.normalize("NFC", text)
    assert not any("\ufffd" in piece for piece in pieces)


def test_control_tokens_have_no_text_and_the_tags_of_the_format_do(tokenizer):
    token_ids = tokenizer.encode("a<|im_end|><think>b</think><tool_call>")
    assert "".join(pieces_of(tokenizer, token_ids)) == "a<think>b</think><tool_call>"
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == "a<think>b</think><tool_call>"


@settings(max_examples=150, derandomize=True, deadline=None)
@given(data=st.data())
def test_any_tokens_decode_as_the_library_does_up_to_a_half_character(demo, data):
    token_ids = data.draw(st.lists(st.integers(0, 4095), max_size=40))
    pieces = pieces_of(demo, token_ids)
    full = demo.decode(token_ids, skip_special_tokens=True)
    text = "".join(pieces)
    assert full.startswith(text)
    assert set(full[len(text) :]) <= {"\ufffd"}  # a half character at the end is left out


def test_a_character_cut_off_at_the_end_is_never_shown(tokenizer):
    token_ids = tokenizer.encode("🫠" * 3)
    for cut in range(len(token_ids)):
        assert "\ufffd" not in "".join(pieces_of(tokenizer, token_ids[:cut]))


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    text=st.text("abc<", max_size=30),
    stops=st.lists(st.text("abc<", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 5), min_size=1),
)
def test_stop_strings_end_the_text_whatever_pieces_it_comes_in(text, stops, cuts):
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    expected, expected_stop = (text, None) if not ends else (text[: min(ends)[1]], min(ends)[2])
    matcher, released, found, start = StopMatcher(stops), "", None, 0
    for cut in cuts * (len(text) + 1):
        piece, start = text[start : start + cut], start + cut
        free, found = matcher.push(piece)
        released += free
        assert expected.startswith(released)
        if found:
            break
    released += "" if found else matcher.flush()
    assert (released, found) == (expected, expected_stop)


def test_text_that_may_become_a_stop_string_is_held_back(demo):
    stream = TextStream(demo, ["</answer>"], 0)
    assert stream.push(demo.encode("yes </ans")).text == "yes "
    assert stream.push(demo.encode("or")).text == "</ansor"
    assert stream.push(demo.encode(" </answe")).text == " "
    assert stream.finish() == "</answe"


def test_tokens_behind_a_stop_string_do_not_count(demo):
    token_ids = demo.encode("one STOP two three")
    stream = TextStream(demo, ["STOP"], 0)
    piece = stream.push(token_ids)
    assert (piece.text, piece.stop_string) == ("one ", "STOP")
    assert "STOP" in demo.decode(token_ids[: piece.num_tokens])
    assert "STOP" not in demo.decode(token_ids[: piece.num_tokens - 1])
    assert stream.num_tokens == piece.num_tokens


def test_no_stop_string_counts_before_min_tokens(demo):
    token_ids = demo.encode("x STOP y STOP z")
    first = TextStream(demo, ["STOP"], 0).push(token_ids).num_tokens
    piece = TextStream(demo, ["STOP"], first + 1).push(token_ids)
    assert (piece.text, piece.stop_string) == ("x STOP y ", "STOP")


def test_a_stop_token_counts_but_has_no_text(demo):
    *token_ids, last = demo.encode("ab cd")
    stream = TextStream(demo, [], 0)
    piece = stream.push([*token_ids, last], stop_token_id=last)
    assert (piece.text, piece.num_tokens) == (demo.decode(token_ids), len(token_ids) + 1)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(CheckpointError, match="cannot read"):
        Tokenizer.load(path)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        Tokenizer.load(path)


def test_model_info_is_read_from_the_published_files(published_model):
    model = published_model
    assert (model.name, model.vocab_size, model.context_tokens) == ("qwen", 248320, 262144)
    assert model.eos_token_ids == (248046, 248044)
    assert model.sampling == Sampling(temperature=0.6, top_p=0.95, top_k=20)
    assert model.template is not None


def test_model_info_names_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelInfo.load(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 8}')
    with pytest.raises(CheckpointError, match="max_position_embeddings"):
        ModelInfo.load(tmp_path)
