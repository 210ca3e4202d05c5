"""The text the small tokenizers are trained on, and the nasty strings they are tested with.

All sentences were written for this file. No code point here was assigned after Unicode 13, because
Oniguruma (the reference) and PCRE2 (our engine) carry tables of different age. Code points meant to
be unassigned are noncharacters or holes that no version up to 16 has filled.
"""

SENTENCES = """
The engine reads the weights once, packs them for the tensor cores, and never looks back.
When the queue is long, it's better to batch; when it's short, we'd rather answer at once.
I'll say it again: don't measure what you can't repeat, and they've never agreed on that.
She said "hello" to the world, and the world said hello, hello, hello back to her.
Numbers such as 7, 42, 365, 1024, 31415 and 271828 are split differently by each family.
In 2024 there were 12 months; in 2025 there were 12 more, 100 percent as expected.
Die Größe der Wörter ändert sich, wenn man über Äpfel, Öl und Übermut schreibt.
Der schnelle Fuchs läuft über die Straße und freut sich über das schöne Wetter.
L'été dernier, à l'hôtel, le garçon a mangé une crème brûlée près de la forêt.
Où est passée la clé du château ? Elle était là, à côté de l'œuf et du cœur.
El niño pequeño comió una piña mañana por la mañana; ¿quién lo vio? ¡Nadie!
Быстрая лиса бежит через лес, а медленная собака спит под старым деревом.
Мы читаем книги вечером и пишем письма утром, когда в доме ещё тихо.
Η γρήγορη αλεπού τρέχει στο δάσος και ο ήλιος λάμπει πάνω από τη θάλασσα.
今天天气很好，我们去公园散步，然后回家吃饭。
模型读取权重，然后计算下一个词，再下一个词。
今日は天気がいいので、公園を散歩してから家に帰ります。
カタカナとひらがなと漢字がまざった文です。
오늘은 날씨가 좋아서 공원에서 산책을 하고 집에 돌아갑니다.
القط الصغير يجلس على السجادة ويشرب الحليب كل صباح.
הילד הקטן קורא ספר בגינה ליד העץ הגדול.
बच्चा बगीचे में किताब पढ़ता है और फिर घर जाता है।
แมวตัวเล็กนอนอยู่บนเสื่อและดื่มนมทุกเช้า
Con mèo nhỏ ngồi trên tấm thảm và uống sữa vào mỗi buổi sáng.
Mały kot siedzi na dywanie i pije mleko każdego ranka, więc żółw śpi.
Küçük kedi halının üzerinde oturur ve her sabah süt içer, İstanbul'da.
What a day 😀 😂 🎉 we won 🏆 and then it rained 🌧 again 😭 but fine 👍
"""

CODE = '''
int main(int argc, char **argv) {
    for (int i = 0; i < argc; i++) {
        printf("%d: %s\\n", i, argv[i]);
    }
    return 0;
}

def add(a, b):
    """Add two numbers."""
    if a is None:
        return b
    return a + b

local function step(batch)
\tfor i = 1, #batch do
\t\tbatch[i] = batch[i] + 1
\tend
\treturn batch
end

SELECT name, count(*) FROM runs WHERE status = 'ok' GROUP BY name;
{"name": "value", "list": [1, 2, 3], "nested": {"a": true, "b": null}}
<html><body class="main"><p>text</p></body></html>
https://example.org/path/to/page?query=value&other=1#anchor
'''


def training_lines():
    """Repeated with variations, so that merges of every length are worth learning."""
    lines = [line for line in SENTENCES.split("\n") if line]
    out = lines * 4 + [line + "\n" for line in CODE.split("\n")] * 3
    out += [CODE, CODE.replace("    ", "\t"), "\r\n".join(lines[:5]), "\n\n\n", "        x\n\n"]
    out += [f"{n} {n * 7} {n * 131:05d}" for n in range(0, 400, 3)]
    out += [line.upper() for line in lines[:6]] + [line.title() for line in lines[:6]]
    return out


def cases():
    """(name, text) in a fixed order."""
    out = []

    def add(name, *texts):
        for i, text in enumerate(texts):
            out.append((f"{name} {i}" if len(texts) > 1 else name, text))

    add("empty", "")
    add("one character", "a", " ", "\n", "\t", "0", "é", "中", "😀", ".", "'", "_", "\u0301")
    add("plain", "Hello world", "hello world", " hello", "hello ", "  hello  world  ",
        "The engine reads the weights once.", "HELLO WORLD", "HelloWorld helloWorld HELLOworld",
        "hello, hello; hello: hello! hello? (hello) [hello] {hello}", "a.b.c", "a_b_c", "a-b-c",
        "don't stop", "hello hello hello hello hello hello")
    add("only spaces", "  ", "   ", "    ", " " * 7, " " * 8, " " * 33)
    add("only newlines", "\n\n", "\n\n\n", "\r\n", "\r\n\r\n", "\r", "\n\r", "\n" * 17)
    add("mixed blank", " \n", "\n ", " \n ", "\t\n\t", "  \n\n  \n", "\t\t", " \t ", "\v\f",
        "\n\t \n x")
    add("spaces inside", "a  b", "a   b", "a    b", "a\tb", "a \t b", "a\n\nb", "a \n b", "a\n b",
        "a  \n  b", "a\r\nb", "a \r\n b", "x     ", "     x", "x\n", "\nx", "x \n", "x  \n\n")
    add("unicode space", "a\u00a0b", "a \u00a0 b", "\u00a0\u00a0", "a\u3000b", "\u3000中\u3000",
        "a\u2003b\u2009c", "a\u200bb", "\u200b", "a\u2028b\u2029c", "a\u0085b", "a\u180eb",
        "a\u202fb", "a\u1680b", "a\u205f\u2060b", "\ufeffstart", "mid\ufeffdle", "a\u001cb\u001fc")
    # Where only \s decides, no letter is near. PCRE2 counts U+180E as a space, Unicode does not.
    for c in "\u0085\u00a0\u1680\u180e\u2003\u200b\u2028\u202f\u205f\u2060\u3000\ufeff\x1c\x1f\v":
        add(f"space class {ord(c):04X}", f"! {c} !{c}{c}?{c}", f"{c}{c}")
    add("contractions", "it's I'll you're we've I'm he'd can't",
        "IT'S I'LL YOU'RE WE'VE I'M HE'D CAN'T",
        "it’s I’ll you’re we’ve I’m he’d can’t", "'s 't 're 've 'm 'll 'd", "'S'T'RE'VE'M'LL'D",
        "x'sy x'lly 'll'll ''s '''", "it'\u017f IT'\u017f", "rock 'n' roll o'clock", "'tis 'twas",
        "l'été d'accord qu'il s'est", "He'Ll they'rE", "42's 42'll", "!'s ?'ll", "\n's \n'll",
        "日'll 中's")
    add("digits", *["1234567890"[:n] for n in range(1, 11)])
    add("numbers", "3.14159", "1,234,567.89", "-42", "+42", "1e10", "0x1F", "12:34:56",
        "2024-05-06",
        "a1b2c3", "abc123def", "100%", "$100", "€99,99", "1 2 3", "1  22   333    4444", "007",
        "1234567890123456789012345678901234567890")
    add("other digits", "٠١٢٣٤٥٦٧٨٩", "१२३४५", "๑๒๓", "x² + y³ = z⁴", "½ ¼ ¾ 1½", "Ⅳ Ⅻ ⅷ",
        "①②③", "１２３４５", "12٣٤56", "𝟏𝟐𝟑𝟒", "三千五百", "a²b")
    add("composed", "café crème brûlée", "Ünïcödé", "naïve façade", "Å Å", "ﬁnance ﬀ", "ệ ộ ặ",
        "İstanbul ıstanbul", "straße STRASSE ẞ", "Ǆ ǅ ǆ")
    add("decomposed", "cafe\u0301 cre\u0300me bru\u0302le\u0301e",
        "U\u0308ni\u0308co\u0308de\u0301",
        "A\u030a", "e\u0323\u0302 e\u0302\u0323", "o\u0323\u0302",
        "\u1112\u1161\u11ab\u1100\u1173\u11af",
        "가각힣", "\u212b \u2126 \u212a", "q\u0307\u0323 q\u0323\u0307", "I\u0307")
    add("lone marks", "\u0301", " \u0301", "\u0301a", "a\u0301\u0302\u0303\u0304\u0305", "1\u0301",
        ".\u0301", "\u0301\u0301\u0301", "\u20d7 x\u20d7", "\u0e31", "\u0940", "\n\u0301",
        "x \u0301y")
    add("chinese", "今天天气很好。", "你好，世界！", "中文和English混排2024年", "「引号」『双引号』",
        "㐀㐁 𠀀𠀁𪛖", "繁體字與简体字", "，。！？；：")
    add("japanese", "今日は天気がいいです。", "カタカナ", "ひらがな", "がぎぐ か\u3099き\u3099", "ｶﾀｶﾅ ﾊﾝｶｸ",
        "東京都2020年、ー〜々ゝ", "ｗｗｗ")
    add("korean", "오늘은 날씨가 좋아서", "안녕하세요 세계", "ㅋㅋㅋ ㅎㅎ ㅠㅠ")
    add("arabic", "القط الصغير", "مَرْحَبًا بِالْعَالَمِ", "السلام عليكم 123 ورحمة", "ﷺ ﻻ لا",
        "ـــكتابـــ")
    add("hebrew", "הילד הקטן", "שָׁלוֹם עוֹלָם", "abc הילד 123")
    add("devanagari", "बच्चा बगीचे में", "क्षत्रिय ज्ञान श्री", "हिन्दी में १२३", "क\u094dष",
        "कि की कु कू", "ॐ।॥")
    add("thai", "แมวตัวเล็กนอนอยู่", "ที่นี่ น้ำ กำ", "ภาษาไทย123")
    add("other scripts", "Быстрая лиса", "БЫСТРАЯ Лиса ёЁ", "Η γρήγορη αλεπού ΣΊΣΥΦΟΣ",
        "தமிழ் மொழி",
        "বাংলা ভাষা", "ქართული ენა", "Հայերեն լեզու", "አማርኛ", "ᓄᓇᕗᑦ", "ខ្មែរ", "မြန်မာ", "བོད་སྐད",
        "ᚠᚢᚦ",
        "𐍈𐌰𐌽", "𝓗𝓮𝓵𝓵𝓸 𝕎𝕠𝕣𝕝𝕕", "ℋℯℓℓℴ", "ʰʲʷ ˈkæt")
    add("emoji", "😀😂🎉", "hello 😀 world", "👍🏽", "👨\u200d👩\u200d👧\u200d👦", "🏳️\u200d🌈", "🇩🇪🇫🇷🇯🇵",
        "❤️ ❤ ☀️", "1️⃣2️⃣#️⃣", "👩🏿\u200d💻", "a😀b😀c", "😀 \n😀", "🤦🏼\u200d♂️!!!", "(╯°□°)╯︵ ┻━┻",
        "¯\\_(ツ)_/¯")
    add("code", "int main(void) {\n    return 0;\n}\n", "def f(x):\n\treturn x + 1\n\n\n",
        "a = b\r\n\tc = d\r\n",
        "if (x) {  \n  y();   \n}", "/* comment */ // more", "for(i=0;i<10;++i)", "x->y.z[0]++",
        "a&&b||!c",
        "#include <stdio.h>", "\t\tdeep\n\t\t\tdeeper", "        eight\n                sixteen",
        "{\"a\": [1, 2.5, null]}",
        "SELECT * FROM t WHERE a='b';", "path/to/file.c:42: error", "//////", "a/b\n/c",
        "...///\n\n///...",
        "\\n\\t\\\\", "`code` **bold** _it_",
        "snake_case camelCase PascalCase SCREAMING_CASE kebab-case",
        "getHTTPResponseCode XMLHttpRequest", "<div class=\"a\">text</div>", "$x = @{y}; %z",
        "--flag=value -x",
        "!=== <=> |> :: -> =>", "=" * 40, "-" * 3 + "\n" + "-" * 80, "0b1010_1111u64")
    add("url", "https://example.org/path?q=1&r=two#three", "mailto:someone@example.org",
        "http://例え.テスト/パス", "www.example.org", "user@host:~/dir$ ls -la",
        "C:\\Users\\name\\file.txt")
    add("long", "a" * 300, "ab" * 100, "antidisestablishmentarianism" * 5, "1" * 100, "!" * 100,
        "中" * 60, "😀" * 20, "e\u0301" * 40, " a" * 60, "The engine " * 12, "\n \n" * 12,
        "aaaaaaaaaabbbbbbbbbbcccccccccc")
    add("specials inside", "<|begin_of_text|>hi<|end_of_text|>", "<|im_start|>user\nhi<|im_end|>\n",
        "a<|endoftext|>b", "a <|endoftext|> b", "<|endoftext|><|endoftext|>", "<|im_start|",
        "<s>hi</s>",
        "<s> hi </s>", "a</s>b", "<unk>", "[INST] hi [/INST]", "[INST]hi[/INST]there",
        "<0x41><0x0A>", "▁ ▁▁ a▁b",
        "<|start|>user<|message|>hi<|end|>", "<|eot_id|>\n\n<|eot_id|>", "Ġhello Ċ", "<|IM_START|>",
        "<s><s>x</s></s>",
        " <s> ", "hello</s>  hello", "x<|im_end|>\n<|im_start|>y")
    add("added variants", "a <left> b", "a  <left>  b", "a <right> b", "a  <right>  \n b",
        "a <both> b",
        "a \t<both>\t b", "<both>", "one word two", "onewordtwo word", "word", "words sword",
        "a-word-b", "_word_",
        "wörd word1 1word", "word\u0301", "中word文", "<café>", "<cafe\u0301>", "x<cafe\u0301>y",
        "<raw-é>", "<raw-e\u0301>",
        "<lef", "<left><right>", "<left> <right>", "<longer><long>", "<longest>",
        "word <both> word")
    add("control", "\x00", "a\x00b", "\x01\x02\x03", "\x1b[31mred\x1b[0m", "a\x7fb", "\x80\x9f",
        "\x08\x08")
    add("odd code points", "\ue000\uf8ff", "a\ue000b", "\U000f0000\U0010fffd", "\u0378\u0379",
        "a\u0378b",
        "\ufffe\uffff", "\U0010ffff", "\ufdd0", "\ufffd", "a\ufffdb", "\u00ad", "soft\u00adhyphen",
        "\u202eright to left\u202c", "\u2066x\u2069", "\ufe0f", "\U000e0041\U000e007f",
        "\u061c\u200e\u200f")
    add("punctuation", "“quoted” ‘single’ «guillemets»", "– — ― …", "• ◦ ‣", "§ ¶ † ‡",
        "¿qué? ¡sí!",
        "100°C ±5 µm Ω ∑ ∫ √ ≈ ≠ ≤", "© ® ™", "← ↑ → ↓", "!!!???...", "\"'\"'\"", "a,b;c:d",
        "€ £ ¥ ₹", "№ ª º",
        "½ cup", "x̄ ± s", "^~`´¨¸", " !", " ! ?", "\n!", "a !b")
    add("ignore merges", "engine", " engine", " weights", "weights", " hello", "tensor", " quick",
        "The engine reads engine weights")
    return out


# Bytes that are not UTF-8. They are replaced before anything else sees them, by U+FFFD for each
# maximal subpart, which is what Python's errors="replace" and the Unicode standard's table 3-8 do.
INVALID = [
    b"\xff", b"\xfe\xff", b"a\xffb", b"\x80", b"a\x80\x80b", b"\xc3", b"a\xc3", b"\xc3(",
    b"\xc0\x80", b"\xc1\xbf",
    b"\xe2\x82", b"\xe2\x82x", b"\xe2(\xa1", b"\xe0\x80\x80", b"\xe0\x9f\xbf", b"\xed\xa0\x80",
    b"\xed\xbf\xbf",
    b"\xed\xa0\xbd\xed\xb8\x80", b"\xf0\x9f\x98", b"\xf0\x9f\x98 x", b"\xf0\x9f", b"\xf0(\x8c\xbc",
    b"\xf0\x80\x80\x80",
    b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xf8\x88\x80\x80\x80", b"\xfc\x84\x80\x80\x80\x80",
    b"ok \xe4\xb8\xad bad \xe4\xb8 ok", b"\xe4\xb8\xe4\xb8\xad", b"\xf0\x9f\x98\x80\x80",
    b"caf\xe9 cr\xe8me",
    b"\x93smart\x94", b"\xef\xbb", b"\xef\xbb\xbf\xff", b"\x00\xff\x00", b"\n\xc3\n",
    b" \xc3 \xe2\x82 \xf0\x9f ",
    b"\x61\xf1\x80\x80\xe1\x80\xc2\x62\x80\x63\x80\xbf\x64",
]
