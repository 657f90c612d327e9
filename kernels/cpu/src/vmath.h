// exp, tanh and the two GELUs on vectors. Included by level.cc after simd.h, inside the namespace
// of a level.
//
// Errors over all floats, measured against float64: exp_neg and tanh_ 2e-7 absolute, exp_ 4e-7
// relative, gelu and gelu_tanh 4e-7 relative to max(1, |x|). NaN comes out as NaN.

// 2^(x log2(e)) for x <= 0: exactly 0 below -87.3, so that -inf and any large negative mask give 0.
SAMP_INLINE vf exp_neg(vf x) {
  const vf magic = set1(12582912.0f);  // 1.5 * 2^23: the sum's low bits are the rounded integer
  vf t = fma(x, set1(1.44269504f), magic);
  vf n = t - magic;
#if SAMP_LEVEL >= 1
  vf r = fma(n, set1(-0.69314718f), x);  // float(ln 2) is within 2e-9, and n is at most 126
#else
  vf r = (x - n * set1(0.693359375f)) + n * set1(2.12194440e-4f);  // no fma: ln 2 in two parts
#endif
  // exp(r) on |r| <= ln(2) / 2: 1 + r + r^2 q(r), minimax in relative error, 1.5e-7 in float32.
  vf p = fma(r, set1(0.00831251871f), set1(0.0418903679f));
  p = fma(p, r, set1(0.166671157f));
  p = fma(p, r, set1(0.499992311f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  vi y = (vi)((vu)p + ((vu)t << 23));  // p * 2^n: the magic number itself is shifted out
#if SAMP_LEVEL >= 3
  __mmask16 keep = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_mov_epi32(keep, (__m512i)y);
#else
  return (vf)(y & ~(vi)(x < set1(-87.3f)));
#endif
}

// exp over all floats; above 88.3 it stays at exp(88.3).
SAMP_INLINE vf exp_(vf x) { return exp_neg(vmin(set1(88.3f), x)); }

SAMP_INLINE vf tanh_(vf x) {
  // (1 - e) / (1 + e), e = exp(-2 |x|), with the sign of x.
  vf a = vabs(x);
  vf e = exp_neg(a * set1(-2.0f));
  vf y = (set1(1.0f) - e) / (set1(1.0f) + e);
  return (vf)((vi)y | ((vi)x & set1i((int32_t)0x80000000)));
}

// gelu(x) = max(x, 0) - g(|x|), g(a) = a Phi(-a); the tanh form likewise with a sigmoid(-2 u(a)).
// Beyond a = 5.1 g is less than 1e-6 and held constant. Below, g is one polynomial a segment, in a
// itself. Each was fitted by weighted minimax (weight 1 / max(1, a), iteratively reweighted least
// squares on 400 points); coefficients were rounded to float from the highest down, the lower ones
// refitted after each. Segment i is centred on a = i / scale, so that adding the magic number finds
// it: the table look-up reads the low bits of the index only.
#if SAMP_LEVEL >= 3
alignas(64) static const float kGelu[4][32] = {
    // max error 3.5e-07
    {-2.10861373e-08f, -3.31536612e-05f, -0.000580244057f, -0.00243408582f, -0.0053981049f,
     -0.00698959641f,  -0.0020472419f,   0.0162164569f,    0.0543459132f,   0.115699798f,
     0.198690087f,     0.296215475f,     0.396830976f,     0.487246186f,    0.555333257f,
     0.592715502f,     0.596238375f,     0.568058848f,     0.514547944f,    0.444469333f,
     0.367046624f,     0.29037413f,      0.220445558f,     0.160837486f,    0.1129172f,
     0.0763642713f,    0.0497951061f,    0.0313334689f,    0.019040199f,    0.0111803701f,
     0.00634764135f,   0.00348628964f},
    {0.500008762f,    0.500949621f,   0.507533073f,   0.521255136f,  0.537107825f,
     0.543975472f,    0.527724922f,   0.476043731f,   0.382125437f,  0.24852176f,
     0.0866366699f,   -0.0856270194f, -0.248009175f,  -0.382354498f, -0.476126701f,
     -0.524176717f,   -0.528602839f,  -0.497098446f,  -0.440512389f, -0.37033987f,
     -0.296750128f,   -0.227405608f,  -0.167088404f,  -0.117950074f, -0.0801227465f,
     -0.0524434336f,  -0.0331115834f, -0.0201847889f, -0.01188959f,  -0.00677180151f,
     -0.00373159186f, -0.00199050293f},
    {-0.399485528f,   -0.408640802f,  -0.435526907f,  -0.46961081f,   -0.497966945f,
     -0.50784564f,    -0.490021825f,  -0.44122991f,   -0.364062667f,  -0.267029077f,
     -0.161720157f,   -0.0602560863f, 0.0271268263f,  0.0936842561f,  0.136742651f,
     0.157333493f,    0.159183204f,   0.147441193f,   0.127492577f,   0.104067549f,
     0.0807494968f,   0.0598418005f,  0.0424979553f,  0.0289943442f,  0.0190402176f,
     0.012053119f,    0.00736417435f, 0.00434689596f, 0.00248099631f, 0.00137015514f,
     0.000732606219f, 0.000379448902f},
    {0.010746629f,     0.042131409f,     0.0794151425f,    0.107822813f,     0.124784477f,
     0.129520997f,     0.122999415f,     0.107630566f,     0.0864805356f,    0.0629758984f,
     0.0401303284f,    0.0202019084f,    0.00452252664f,   -0.00647164974f,  -0.0130636171f,
     -0.0160053689f,   -0.0162625387f,   -0.0148035605f,   -0.0124590481f,   -0.00985214766f,
     -0.00738898385f,  -0.00528752105f,  -0.00362500013f,  -0.00238793204f,  -0.0015147361f,
     -0.000926777371f, -0.000547652016f, -0.000312881399f, -0.000172970424f, -9.25952481e-05f,
     -4.80273375e-05f, -2.41485141e-05f},
};
alignas(64) static const float kGeluTanh[4][32] = {
    // max error 3.5e-07
    {-2.18561347e-08f, -3.32860473e-05f, -0.000581354718f, -0.00242834701f, -0.00534472242f,
     -0.00680588838f,  -0.00167263777f,  0.0166825745f,    0.0544928834f,   0.114810199f,
     0.196021438f,     0.291503429f,     0.390759498f,     0.4815588f,      0.552403688f,
     0.594687998f,     0.604110599f,     0.581123292f,     0.530506968f,    0.460126281f,
     0.379311621f,     0.297153801f,     0.221104279f,     0.156131521f,    0.10452687f,
     0.0662706494f,    0.0397415757f,    0.0225137863f,    0.0120326588f,   0.00605897093f,
     0.00287053362f,   0.00127774349f},
    {0.500008821f,   0.500953615f,    0.507549942f,   0.521224737f,    0.536829948f,
     0.543163896f,   0.526267767f,    0.474316239f,   0.381173283f,    0.249818102f,
     0.0913999826f,  -0.0772496462f,  -0.237424195f,  -0.372318417f,   -0.469859391f,
     -0.524166703f,  -0.535649478f,   -0.509988368f,  -0.456483215f,   -0.386022687f,
     -0.309219182f,  -0.234919742f,   -0.169325069f,  -0.115763403f,   -0.0750248656f,
     -0.0460521393f, -0.0267459434f,  -0.0146801844f, -0.00760564394f, -0.0037145738f,
     -0.0017079172f, -0.000738257542f},
    {-0.399488211f,   -0.408683091f,  -0.435626715f,  -0.46960178f,   -0.497528106f,
     -0.506676853f,   -0.488124371f,  -0.439066321f,  -0.362527192f,  -0.267120302f,
     -0.164064527f,   -0.0647318959f, 0.0214557331f,  0.0882743299f,  0.133049861f,
     0.156303599f,    0.16096729f,    0.151417568f,   0.13256216f,    0.109045826f,
     0.0847126991f,   0.0623129159f,  0.0434521958f,  0.0287327655f,  0.0180118196f,
     0.0106973136f,   0.00601374032f, 0.00319676218f, 0.00160495564f, 0.000760074414f,
     0.000339089369f, 0.00014231111f},
    {0.0107994769f,    0.0423234962f,    0.0796942264f,    0.108018212f,     0.124730267f,
     0.129133344f,     0.122337267f,     0.106881104f,     0.0859007612f,    0.062788628f,
     0.0404313765f,    0.0209221244f,    0.00545852026f,   -0.00557702733f,  -0.0124298353f,
     -0.0157494079f,   -0.0163806845f,   -0.0151959145f,   -0.0129807182f,   -0.0103641953f,
     -0.00779415015f,  -0.00554290041f,  -0.00373503729f,  -0.00238656509f,  -0.00144603709f,
     -0.00083045091f,  -0.000451691216f, -0.000232453138f, -0.000113058719f, -5.19050955e-05f,
     -2.24636824e-05f, -9.15203509e-06f},
};
#elif SAMP_LEVEL >= 1
alignas(64) static const float kGelu[6][8] = {
    // max error 3.0e-07
    {8.67055672e-09f, 6.05936366e-05f, -0.0334365703f, -0.133797109f, 0.414377362f, 1.04982388f,
     0.684842825f, 0.187184244f},
    {0.49999854f, 0.499152005f, 0.647372544f, 0.968432903f, -0.156186447f, -1.23043346f,
     -0.754570186f, -0.184310719f},
    {-0.398892194f, -0.39413172f, -0.659058452f, -1.07100117f, -0.145020813f, 0.582833707f,
     0.334493756f, 0.0727829337f},
    {-0.000635180215f, -0.0143703036f, 0.225225553f, 0.490203142f, 0.107662082f, -0.139378354f,
     -0.074533388f, -0.0144052487f},
    {0.0701445788f, 0.0908190683f, -0.0190460812f, -0.104484253f, -0.0251821242f, 0.0168159995f,
     0.00834425632f, 0.0014286848f},
    {-0.00976383593f, -0.0228743535f, -0.00240272447f, 0.00864247326f, 0.00204236526f,
     -0.000818343833f, -0.000375320611f, -5.67918323e-05f},
};
alignas(64) static const float kGeluTanh[6][8] = {
    // max error 2.9e-07
    {4.80839235e-09f, 4.84492593e-05f, -0.0332981348f, -0.125549108f, 0.369239539f, 1.08832729f,
     0.733241439f, 0.150498047f},
    {0.49999854f, 0.499265999f, 0.647380769f, 0.94309175f, -0.0698152035f, -1.27572656f,
     -0.819019854f, -0.150383607f},
    {-0.398891181f, -0.394543678f, -0.660451949f, -1.04064596f, -0.208464175f, 0.602307141f,
     0.367442161f, 0.060193073f},
    {-0.000648443878f, -0.0136756785f, 0.228032932f, 0.473090172f, 0.130052656f, -0.14309895f,
     -0.0827392563f, -0.0120623624f},
    {0.0705513507f, 0.0906833485f, -0.02079124f, -0.0999668017f, -0.0290096793f, 0.0170998294f,
     0.00934844837f, 0.00121008116f},
    {-0.00997694302f, -0.0229703896f, -0.00206531654f, 0.00819059927f, 0.00229787361f,
     -0.000821764697f, -0.000423883495f, -4.86118515e-05f},
};
#endif

#if SAMP_LEVEL >= 1

#if SAMP_LEVEL >= 3
constexpr float kGeluScale = 6.1760783f;
SAMP_INLINE vf look_up(const float* row, vi i) {
  return (vf)_mm512_permutex2var_ps(_mm512_load_ps(row), (__m512i)i, _mm512_load_ps(row + 16));
}
#else
constexpr float kGeluScale = 1.4701961f;
SAMP_INLINE vf look_up(const float* row, vi i) {
  return (vf)_mm256_permutevar8x32_ps(_mm256_load_ps(row), (__m256i)i);
}
#endif

template <int rows, int columns>
SAMP_INLINE vf gelu_table(vf x, const float (&c)[rows][columns]) {
  vf a = vmin(set1(5.1f), vabs(x));  // the order of the operands keeps NaN
  vi i = (vi)fma(a, set1(kGeluScale), set1(12582912.0f));
  vf g = look_up(c[rows - 1], i);
#pragma GCC unroll 8
  for (int d = rows - 2; d >= 0; --d) g = fma(g, a, look_up(c[d], i));
  return vmax(vf{}, x) - g;
}
SAMP_INLINE vf gelu(vf x) { return gelu_table(x, kGelu); }
SAMP_INLINE vf gelu_tanh(vf x) { return gelu_table(x, kGeluTanh); }

#else

SAMP_INLINE vf gelu(vf x) {
  // Phi(-a) by Abramowitz and Stegun 7.1.26: a polynomial in 1 / (1 + p z) times exp(-z^2).
  vf a = vmin(set1(14.0f), vabs(x));
  vf t = set1(1.0f) / (set1(1.0f) + a * set1(0.3275911f * 0.707106781f));
  vf p = t * set1(0.5f * 1.061405429f) + set1(0.5f * -1.453152027f);
  p = p * t + set1(0.5f * 1.421413741f);
  p = p * t + set1(0.5f * -0.284496736f);
  p = p * t + set1(0.5f * 0.254829592f);
  return vmax(vf{}, x) - a * (p * t * exp_neg(a * a * set1(-0.5f)));
}

SAMP_INLINE vf gelu_tanh(vf x) {
  vf a = vmin(set1(7.0f), vabs(x));
  vf e = exp_neg(a * (a * a * set1(-2.0f * 0.0356774081f) + set1(-2.0f * 0.797884561f)));
  return vmax(vf{}, x) - a * (e / (set1(1.0f) + e));
}

#endif
